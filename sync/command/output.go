package command

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"kedge/deployments"
)

const (
	keepHead = 16 << 10
	// maskReach is how many bytes of a line are kept beyond MaxLine, so that a masked value isn't cut in two
	// there.
	maskReach = 4 << 10
	// lastLines is how many of MaxLines are kept for the end of a long output, which says why a command failed.
	lastLines = 100
	keepTail  = MaxOutput - keepHead - 256 // leaves room for the note between head and tail
)

// output keeps the beginning and the end of a stream, and logs its lines, in bounded memory.
type output struct {
	log  *slog.Logger
	mask *deployments.Mask // masks log lines and errors, not the bytes kept

	mu     sync.Mutex
	closed bool
	head   []byte
	tail   []byte // a ring buffer, once it is full
	next   int    // index of the next byte in tail
	total  int64

	line    []byte // the current line, at most MaxLine + maskReach bytes of it
	clipped int    // bytes dropped from the current line
	lines   int
	last    []string // the last lines beyond those that were logged at once; a ring buffer, once it is full
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return len(p), nil
	}
	o.keep(p)
	for rest := p; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		part := rest
		if i >= 0 {
			part = rest[:i]
		}
		room := min(MaxLine+maskReach-len(o.line), len(part))
		o.line = append(o.line, part[:room]...)
		o.clipped += len(part) - room
		if i < 0 {
			break
		}
		o.endLine()
		rest = rest[i+1:]
	}
	return len(p), nil
}

func (o *output) keep(p []byte) {
	o.total += int64(len(p))
	n := min(keepHead-len(o.head), len(p))
	o.head = append(o.head, p[:n]...)
	p = p[n:]
	if len(p) >= keepTail {
		o.tail = append(o.tail[:0], p[len(p)-keepTail:]...)
		o.next = 0
		return
	}
	if n = min(keepTail-len(o.tail), len(p)); n > 0 {
		o.tail = append(o.tail, p[:n]...)
		p = p[n:]
	}
	for len(p) > 0 {
		n = copy(o.tail[o.next:], p)
		o.next = (o.next + n) % keepTail
		p = p[n:]
	}
}

func (o *output) endLine() {
	text := o.mask.Text(strings.TrimRight(string(o.line), "\r"))
	if over := len(text) - MaxLine; over > 0 {
		text, o.clipped = text[:MaxLine], o.clipped+over
	}
	text = strings.ToValidUTF8(text, "\ufffd")
	if o.clipped > 0 {
		text += fmt.Sprintf(" [%d more bytes]", o.clipped)
	}
	o.line, o.clipped = o.line[:0], 0
	if o.lines++; o.lines > MaxLines-lastLines {
		if len(o.last) < lastLines {
			o.last = append(o.last, text)
		} else {
			o.last[(o.lines-MaxLines-1)%lastLines] = text
		}
		return
	}
	o.log.Info("output", LineKey, text)
}

// close ends the current line, and logs the lines that were kept for the end, below a note of how many were left out.
// Write drops what is written from then on.
func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.line) > 0 {
		o.endLine()
	}
	if over := o.lines - MaxLines; over > 0 {
		o.log.Info("output", LineKey, fmt.Sprintf("[%d lines left out]", over))
		o.last = append(o.last[over%lastLines:], o.last[:over%lastLines]...)
	}
	for _, text := range o.last {
		o.log.Info("output", LineKey, text)
	}
	o.last = nil
	o.closed = true
}

func (o *output) bytes() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := bytes.Clone(o.head)
	if left := o.total - int64(len(o.head)) - int64(len(o.tail)); left > 0 {
		b = fmt.Appendf(b, "\n[%d bytes left out]\n", left)
	}
	b = append(b, o.tail[o.next:]...)
	return append(b, o.tail[:o.next]...)
}

// lastLine returns the last line that isn't blank, mostly the reason of a failure; empty: there is none. It is masked,
// cut by clip, and without control characters, as it is shown on terminals and passed on in environments.
func (o *output) lastLine() string {
	b := bytes.TrimSpace(o.bytes())
	if i := bytes.LastIndexAny(b, "\r\n"); i >= 0 {
		b = b[i+1:]
	}
	b = []byte(o.mask.Text(string(b)))
	return clip(strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case unicode.IsControl(r):
			return utf8.RuneError
		}
		return r
	}, string(b)))
}
