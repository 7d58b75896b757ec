package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"kedge/sync/fleet"
)

func TestScreen(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	width, height := 80, 10
	noon := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	s := &screen{out: &out, size: func() (int, int) { return width, height }, draw: func(w io.Writer, f *fleet.Fleet, width int) {
		fmt.Fprintf(w, "%d wide\n%.0fs ago\n", width, f.At.Sub(noon).Truncate(2*time.Second).Seconds())
		for i := range f.Units {
			fmt.Fprintf(w, "unit %d\n", i)
		}
	}}
	step := func(f *fleet.Fleet, after time.Duration) string {
		out.Reset()
		s.show(f, noon.Add(after))
		return out.String()
	}
	if got := step(nil, 0); got != "" {
		t.Errorf("before it has seen a fleet it writes %q", got)
	}
	f := &fleet.Fleet{At: noon, Units: make([]fleet.Unit, 1)}
	if got, want := step(f, 0), "\x1b[H\x1b[2J80 wide\x1b[K\n0s ago\x1b[K\nunit 0\x1b[K\n\x1b[J"; got != want {
		t.Errorf("first %q, want %q", got, want)
	}
	if got := step(nil, time.Second); got != "" {
		t.Errorf("where nothing shows it writes %q", got)
	}
	if got, want := step(nil, 2*time.Second), "\x1b[H80 wide\x1b[K\n2s ago\x1b[K\nunit 0\x1b[K\n\x1b[J"; got != want {
		t.Errorf("later %q, want %q", got, want)
	}
	width = 60
	if got := step(nil, 2*time.Second); !strings.HasPrefix(got, "\x1b[H\x1b[2J60 wide") {
		t.Errorf("in another window %q", got)
	}
	if f.At != noon {
		t.Error("it changed the fleet that it was given")
	}
	f.Units = make([]fleet.Unit, 20)
	if got := step(f, 0); !strings.Contains(got, "unit 5\x1b[K\n… 14 more lines") || strings.Contains(got, "unit 6") {
		t.Errorf("of what is too long it shows %q", got)
	}
}

func TestCut(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		text        string
		width, most int
		want        string // what is left of it
	}{
		{"a\nb\nc\n", 80, 3, "a\nb\nc\n"},
		{"a\nb\nc\n", 80, 2, "a\nb\n"},
		{"a\nb\nc\n", 0, 0, "a\nb\nc\n"},
		{"12345\nb\n", 5, 2, "12345\nb\n"},
		{"123456\nb\n", 5, 2, "123456\n"},
		{"\x1b[32m█████\x1b[0m\nb\n", 5, 2, "\x1b[32m█████\x1b[0m\nb\n"},
	} {
		got := cut(c.text, c.width, c.most)
		if _, notice, found := strings.Cut(got, "…"); found && utf8.RuneCountInString(notice) > max(c.width, 15) {
			t.Errorf("on a screen of %d columns the last line is …%s", c.width, notice)
		}
		if left, _, _ := strings.Cut(got, "…"); left != c.want || (got != c.text) != strings.Contains(got, "more lines") {
			t.Errorf("of %q, %d wide, %d rows show %q", c.text, c.width, c.most, got)
		}
	}
}
