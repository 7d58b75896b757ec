package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"kedge/kv"
	"kedge/sync/fleet"
)

// screen draws a fleet on a terminal, over the drawing before.
type screen struct {
	out  io.Writer
	size func() (width, height int)
	draw func(w io.Writer, f *fleet.Fleet, width int)

	mu            sync.Mutex
	fleet         *fleet.Fleet // as last seen; nil: not yet
	text          string       // what was drawn last
	width, height int          // the terminal's size when text was drawn
}

// watchOnScreen shows the fleet until ctx ends, and returns ctx's error. It draws after every change, and once a
// second, for ages and the window's size.
func (a *app) watchOnScreen(
	ctx context.Context,
	store kv.Store,
	filter fleet.Filter,
	draw func(w io.Writer, f *fleet.Fleet, width int),
) error {
	s := &screen{out: a.stdout, size: func() (int, int) { return terminalSize(a.stdout) }, draw: draw}
	ctx, cancel := context.WithCancel(ctx)
	var ticking sync.WaitGroup
	defer ticking.Wait()
	defer cancel()
	ticking.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				s.show(nil, now)
			}
		}
	})
	return fleet.Watch(ctx, store, filter, func(f *fleet.Fleet) { s.show(f, f.At) })
}

// show draws a fleet; nil: the one that was last seen, if any. It draws nothing if the drawing would be the same.
func (s *screen) show(f *fleet.Fleet, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f != nil {
		s.fleet = f
	}
	if s.fleet == nil {
		return
	}
	aged := *s.fleet
	aged.At = now
	width, height := s.size()
	var b strings.Builder
	s.draw(&b, &aged, width)
	text := cut(b.String(), width, height-2)
	resized := width != s.width || height != s.height
	if text == s.text && !resized {
		return
	}
	s.text, s.width, s.height = text, width, height
	clear := ""
	if resized { // the old drawing has moved
		clear = "\x1b[2J"
	}
	// The text overwrites the old drawing, as clearing first would flicker.
	fmt.Fprint(s.out, "\x1b[H"+clear+strings.ReplaceAll(text, "\n", "\x1b[K\n")+"\x1b[J")
}

// cut replaces the lines below the first most rows of the screen by one that counts them, as the screen's top would
// otherwise scroll away. A line wider than the screen takes several rows. If most is 0 or less, cut returns text.
func cut(text string, width, most int) string {
	lines := strings.SplitAfter(text, "\n")
	lines = lines[:len(lines)-1]
	rows := 0
	for i, line := range lines {
		length := utf8.RuneCountInString(style.ReplaceAllString(strings.TrimSuffix(line, "\n"), ""))
		if rows += 1 + max(0, length-1)/max(1, width); most > 0 && rows > most {
			return strings.Join(lines[:i], "") + moreLinesText(len(lines)-i, width) + "\n"
		}
	}
	return text
}

// moreLinesText returns a line that says that n lines don't fit. It adds the first hint with which
// the line isn't wider than width.
func moreLinesText(n, width int) string {
	short := fmt.Sprintf("… %d more lines", n)
	for _, hint := range []string{"; kedge status STAGE/ROLE or --attention shows less", "; --attention shows less"} {
		if utf8.RuneCountInString(short+hint) <= width {
			return short + hint
		}
	}
	return short
}

// style matches escape sequences of colours.
var style = regexp.MustCompile("\x1b\\[[0-9;]*m")
