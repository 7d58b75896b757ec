package git

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"
)

// query is a fetch's request.
type query struct {
	branch string // by its full name
	want   plumbing.Hash
	haves  []plumbing.Hash // commits that are there, with all that they lead to
}

// version2 is how a server of protocol v2 begins.
const version2 = "version 2"

// greeting is a server's capabilities in protocol v2.
type greeting struct {
	filter bool // it can leave large files out
}

// readGreeting reads it up to its flush, from behind the line "version 2".
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
		err = errors.New("it speaks protocol v2, without ls-refs and fetch")
	}
	return g, err
}

var errSHA256 = errors.New("the repository has the object format sha256: only sha1 can be mirrored")

// advertisedRefs reads all references, as protocol v0 begins; start is what r begins with, with the first reference.
func advertisedRefs(start []byte, r io.Reader) (*packp.AdvRefs, error) {
	_, offered, _ := bytes.Cut(start, []byte("\x00")) // by the first reference
	if offered, _, _ = bytes.Cut(offered, []byte("\n")); bytes.Contains(offered, []byte("object-format=sha256")) {
		return nil, errSHA256
	}
	refs := packp.NewAdvRefs()
	if err := refs.Decode(r); err != nil && !errors.Is(err, packp.ErrEmptyAdvRefs) {
		return nil, fmt.Errorf("list of references: %w", err)
	}
	return refs, nil
}

// lsRefs asks for the references whose names begin with prefix, by protocol v2.
func lsRefs(prefix string) string {
	var ask pkts
	ask.line("command=ls-refs")
	ask.line("agent=%s", capability.DefaultAgent())
	ask.delim()
	ask.line("ref-prefix %s", prefix)
	ask.flush()
	return ask.String()
}

// readRefs reads the answer to lsRefs.
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

// fetch asks for q's pack by protocol v2, in one round. Files that nobody would read stay away where
// the server can leave them out.
func (g greeting) fetch(q query) string {
	var ask pkts
	ask.line("command=fetch")
	ask.line("agent=%s", capability.DefaultAgent())
	ask.delim()
	ask.line("ofs-delta")
	if g.filter {
		ask.line("filter blob:limit=%d", maxFile+1)
	}
	ask.line("want %s", q.want)
	for _, have := range q.haves {
		ask.line("have %s", have)
	}
	ask.line("done")
	ask.flush()
	return ask.String()
}

// packSection reads the answer to fetch up to where its pack begins.
func packSection(r io.Reader) (io.Reader, error) {
	for {
		switch kind, line, err := readPkt(r); {
		case err != nil:
			return nil, fmt.Errorf("pack: %w", noEOF(err))
		case kind == flushPkt:
			return nil, errors.New("pack: the server sends none")
		case kind == dataPkt && line == "packfile":
			return sideband.NewDemuxer(sideband.Sideband64k, r), nil
		}
	}
}

// requestV0 asks for the branch's pack, as the branch is now, as protocol v0 does. Every server knows multi_ack, and
// Azure DevOps and AWS CodeCommit insist on it, though go-git takes it out of what servers offer.
func requestV0(refs *packp.AdvRefs, q query) (*packp.UploadPackRequest, error) {
	want, found := refs.References[q.branch]
	if !found {
		return nil, fmt.Errorf("%w any more: %s", ErrNoBranch, q.branch)
	}
	req := packp.NewUploadPackRequestFromCapabilities(refs.Capabilities)
	req.Wants, req.Haves = []plumbing.Hash{want}, q.haves
	_ = req.Capabilities.Set(capability.MultiACK) // it takes no argument that could be wrong
	if refs.Capabilities.Supports(capability.Filter) {
		_ = req.Capabilities.Set(capability.Filter)
		req.Filter = packp.FilterBlobLimit(maxFile+1, packp.BlobLimitPrefixNone)
	}
	return req, nil
}

// demultiplexed takes a server's progress out of what it sends.
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
