package git

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// pkt is a packet of Git's protocols; see gitprotocol-common(5) and gitprotocol-v2(5).
type pkt int

const (
	dataPkt  pkt = iota
	flushPkt     // ends a message
	delimPkt     // ends a section of a message
	endPkt       // ends a response
)

// maxPkt bounds a packet, its length included.
const maxPkt = 65520

// readPkt reads one packet and nothing beyond it. A line's end is taken off; what a server says in
// an ERR line is an error.
func readPkt(r io.Reader) (kind pkt, line string, err error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return 0, "", err
	}
	n, err := strconv.ParseUint(string(length[:]), 16, 16)
	switch {
	case err != nil:
		return 0, "", fmt.Errorf("it answers %q, which isn't Git's protocol", length[:])
	case n <= uint64(endPkt-flushPkt):
		return flushPkt + pkt(n), "", nil
	case n < 4 || n > maxPkt:
		return 0, "", fmt.Errorf("it sends a packet of %d bytes", n)
	}
	data := make([]byte, n-4)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, "", fmt.Errorf("a packet: %w", noEOF(err))
	}
	line = strings.TrimSuffix(string(data), "\n")
	if words, failed := strings.CutPrefix(line, "ERR "); failed {
		return 0, "", errors.New(bound(strings.TrimSpace(words), maxWords))
	}
	return dataPkt, line, nil
}

// readLines reads the lines of a message, up to the flush that ends it, and gives each to read.
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

// pkts makes a request of lines.
type pkts struct{ strings.Builder }

func (p *pkts) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintf(p, "%04x%s\n", len(text)+5, text)
}

func (p *pkts) delim() { p.WriteString("0001") }
func (p *pkts) flush() { p.WriteString("0000") }
