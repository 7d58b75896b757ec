package deploy

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"sync"

	"kedge/sync/command"
)

const (
	maxLog  = 256 << 10
	logHead = 64 << 10
)

// deploymentLog stores the log of one deployment, at most maxLog bytes. Of a longer log it drops the part after the
// first logHead bytes. Success and failure commands get it on stdin in stretcher's format: date, time, message.
type deploymentLog struct {
	mu   sync.Mutex
	buf  []byte
	left int // bytes dropped after logHead
}

func (l *deploymentLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf, l.left = nil, 0
}

func (l *deploymentLog) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left == 0 {
		return bytes.Clone(l.buf)
	}
	b := bytes.Clone(l.buf[:logHead])
	b = fmt.Appendf(b, "\n[%d bytes left out]\n", l.left)
	return append(b, l.buf[logHead:]...)
}

func (l *deploymentLog) write(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, line...)
	if over := len(l.buf) - maxLog; over > 0 {
		drop := over + maxLog/4 // more than needed, so that not every line moves the buffer
		l.buf = append(l.buf[:logHead], l.buf[logHead+drop:]...)
		l.left += drop
	}
}

// tee is a slog.Handler that writes records of level info and above to a deploymentLog, too, whatever next's level.
type tee struct {
	next  slog.Handler
	text  *deploymentLog
	attrs []slog.Attr
}

func (t tee) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || t.next.Enabled(ctx, level)
}

func (t tee) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		b := r.Time.AppendFormat(nil, "2006/01/02 15:04:05 ")
		if r.Level > slog.LevelInfo {
			b = append(append(b, r.Level.String()...), ' ')
		}
		attr := func(a slog.Attr) bool {
			if a.Key == command.LineKey {
				b = append(append(b, ": "...), a.Value.String()...)
			} else {
				b = fmt.Appendf(b, " %s=%s", a.Key, a.Value)
			}
			return true
		}
		b = append(b, r.Message...)
		for _, a := range t.attrs {
			attr(a)
		}
		r.Attrs(attr)
		t.text.write(append(b, '\n'))
	}
	if !t.next.Enabled(ctx, r.Level) {
		return nil
	}
	return t.next.Handle(ctx, r)
}

func (t tee) WithAttrs(attrs []slog.Attr) slog.Handler {
	return tee{t.next.WithAttrs(attrs), t.text, append(t.attrs[:len(t.attrs):len(t.attrs)], attrs...)}
}

func (t tee) WithGroup(name string) slog.Handler {
	return tee{t.next.WithGroup(name), t.text, t.attrs}
}
