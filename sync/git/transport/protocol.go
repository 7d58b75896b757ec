package transport

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"

	"kedge/deployments/safetext"
)

// Query is a fetch's request.
type Query struct {
	Branch string // the full name
	Want   plumbing.Hash
	Haves  []plumbing.Hash // commits that the client has, with all that they refer to
	// MaxFile is the size in bytes beyond which the server leaves out files, if it can.
	MaxFile int64
}

// ErrNoBranch means that the repository exists but has no such branch: nothing was pushed yet, or the branch has
// another name.
var ErrNoBranch = errors.New("no such branch")

// version2 is the first line of a server of protocol v2.
const version2 = "version 2"

// greeting has a server's capabilities in protocol v2.
type greeting struct {
	filter bool // the server can leave out large files
}

// readGreeting reads a greeting, after its line "version 2", up to and including its flush. It fails if the server
// lacks a command that is needed, or has sha256 objects.
func readGreeting(r io.Reader) (g greeting, err error) {
	lsRefs, fetch := false, false
	err = readLines(r, func(line string) error {
		name, value, _ := strings.Cut(line, "=")
		switch name {
		case "ls-refs":
			lsRefs = true
		case "fetch":
			fetch = true
			g.filter = slices.Contains(strings.Fields(value), "filter")
		case "object-format":
			if value != "sha1" {
				return errSHA256
			}
		}
		return nil
	})
	if err == nil && !(lsRefs && fetch) {
		err = errors.New("the server speaks protocol v2, but lacks ls-refs or fetch")
	}
	return g, err
}

var errSHA256 = errors.New("the repository has the object format sha256: only sha1 can be mirrored")

// advertisedRefs reads the list of all references, with which a server of protocol v0 begins. start is a peek at the
// beginning of r, which has the first reference and, after it, the server's capabilities. An empty list is no error.
func advertisedRefs(start []byte, r io.Reader) (*packp.AdvRefs, error) {
	_, offered, _ := bytes.Cut(start, []byte("\x00")) // after the first reference
	if offered, _, _ = bytes.Cut(offered, []byte("\n")); bytes.Contains(offered, []byte("object-format=sha256")) {
		return nil, errSHA256
	}
	refs := packp.NewAdvRefs()
	if err := refs.Decode(r); err != nil && !errors.Is(err, packp.ErrEmptyAdvRefs) {
		return nil, fmt.Errorf("list of references: %w", err)
	}
	return refs, nil
}

// lsRefs returns protocol v2's request for the references whose names begin with prefix.
func lsRefs(prefix string) string {
	var ask pkts
	ask.line("command=ls-refs")
	ask.line("agent=%s", capability.DefaultAgent())
	ask.delim()
	ask.line("ref-prefix %s", prefix)
	ask.flush()
	return ask.String()
}

// readRefs reads the answer to lsRefs, and returns the hashes of the references that begin with prefix, by full name.
func readRefs(r io.Reader, prefix string) (map[string]string, error) {
	refs := map[string]string{}
	err := readLines(r, func(line string) error {
		hash, name, found := strings.Cut(line, " ")
		if name, _, _ = strings.Cut(name, " "); found && strings.HasPrefix(name, prefix) {
			refs[name] = hash
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list of references: %w", err)
	}
	return refs, nil
}

// fetch returns protocol v2's request for q's pack, in one round. The server leaves files larger than q.MaxFile out of
// the pack, if it can.
func (g greeting) fetch(q Query) string {
	var ask pkts
	ask.line("command=fetch")
	ask.line("agent=%s", capability.DefaultAgent())
	ask.delim()
	ask.line("ofs-delta")
	if g.filter {
		ask.line("filter blob:limit=%d", q.MaxFile+1)
	}
	ask.line("want %s", q.Want)
	for _, have := range q.Haves {
		ask.line("have %s", have)
	}
	ask.line("done")
	ask.flush()
	return ask.String()
}

// packSection reads the answer to fetch up to its pack, and returns a reader of the pack.
func packSection(r io.Reader) (io.Reader, error) {
	for {
		switch kind, line, err := readPkt(r); {
		case err != nil:
			return nil, fmt.Errorf("pack: %w", noEOF(err))
		case kind == flushPkt:
			return nil, errors.New("the server ended its answer to fetch without a pack")
		case kind == dataPkt && line == "packfile":
			return sideband.NewDemuxer(sideband.Sideband64k, r), nil
		}
	}
}

// requestV0 returns protocol v0's request for the pack of the branch's present head; ErrNoBranch if refs lack the
// branch. It always asks for multi_ack, though go-git hides that capability of a server: every server knows it, and
// Azure DevOps and AWS CodeCommit require it.
func requestV0(refs *packp.AdvRefs, q Query) (*packp.UploadPackRequest, error) {
	want, found := refs.References[q.Branch]
	if !found {
		return nil, fmt.Errorf("%w any more: %s", ErrNoBranch, q.Branch)
	}
	req := packp.NewUploadPackRequestFromCapabilities(refs.Capabilities)
	req.Wants, req.Haves = []plumbing.Hash{want}, q.Haves
	_ = req.Capabilities.Set(capability.MultiACK) // can't fail, as it takes no argument
	if refs.Capabilities.Supports(capability.Filter) {
		_ = req.Capabilities.Set(capability.Filter)
		req.Filter = packp.FilterBlobLimit(uint64(q.MaxFile)+1, packp.BlobLimitPrefixNone)
	}
	return req, nil
}

// demultiplexed returns a reader of the pack in a server's answer, without the progress messages mixed into it.
func demultiplexed(req *packp.UploadPackRequest, pack io.Reader) io.Reader {
	switch {
	case req.Capabilities.Supports(capability.Sideband64k):
		return sideband.NewDemuxer(sideband.Sideband64k, pack)
	case req.Capabilities.Supports(capability.Sideband):
		return sideband.NewDemuxer(sideband.Sideband, pack)
	}
	return pack
}

func headsOf(refs *packp.AdvRefs, prefix string) map[string]string {
	heads := map[string]string{}
	for name, hash := range refs.References {
		if strings.HasPrefix(name, prefix) {
			heads[name] = hash.String()
		}
	}
	return heads
}

// pkt is the kind of a packet in Git's protocols; see gitprotocol-common(5) and gitprotocol-v2(5).
type pkt int

const (
	dataPkt  pkt = iota
	flushPkt     // ends a message
	delimPkt     // ends a section of a message
	endPkt       // ends a response
)

// maxPkt bounds a packet, including its length.
const maxPkt = 65520

// readPkt reads exactly one packet, or returns io.EOF. It removes a line's end, and returns an ERR line as an error.
func readPkt(r io.Reader) (kind pkt, line string, err error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return 0, "", err
	}
	n, err := strconv.ParseUint(string(length[:]), 16, 16)
	switch {
	case err != nil:
		return 0, "", fmt.Errorf("the server answers %q, which isn't Git's protocol", length[:])
	case n <= uint64(endPkt-flushPkt):
		return flushPkt + pkt(n), "", nil
	case n < 4 || n > maxPkt:
		return 0, "", fmt.Errorf("the server sent a packet of %d bytes: Git's protocol has 4 to %d", n, maxPkt)
	}
	data := make([]byte, n-4)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, "", fmt.Errorf("reading a packet: %w", noEOF(err))
	}
	line = strings.TrimSuffix(string(data), "\n")
	if words, failed := strings.CutPrefix(line, "ERR "); failed {
		return 0, "", errors.New(safetext.Line(strings.TrimSpace(words), maxWords))
	}
	return dataPkt, line, nil
}

// readLines calls read for each line of a message, up to the flush that ends it.
func readLines(r io.Reader, read func(line string) error) error {
	for {
		kind, line, err := readPkt(r)
		switch {
		case err != nil:
			return noEOF(err)
		case kind == flushPkt:
			return nil
		case kind == dataPkt:
			if err := read(line); err != nil {
				return err
			}
		}
	}
}

// noEOF turns io.EOF into io.ErrUnexpectedEOF.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// pkts builds a request from lines.
type pkts struct{ strings.Builder }

func (p *pkts) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintf(p, "%04x%s\n", len(text)+5, text)
}

func (p *pkts) delim() { p.WriteString("0001") }
func (p *pkts) flush() { p.WriteString("0000") }
