package web

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/a-h/templ"

	"kedge/sync/fleet"
)

func itoa(n int) string { return strconv.Itoa(n) }

// plural returns a noun, in the singular if n is 1; plural2 puts the number before it.
func plural(n int, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}

// agree returns one of two forms of a verb: one if n is 1, else several.
func agree(n int, one, several string) string {
	if n == 1 {
		return one
	}
	return several
}

func plural2(n int, noun string) string { return itoa(n) + " " + plural(n, noun) }

func more(n int) string { return fmt.Sprintf("+%d", n) }

func contains(all []string, one string) bool { return slices.Contains(all, one) }

func names(all []counted) (names []string) {
	for _, c := range all {
		names = append(names, c.Name)
	}
	return names
}

// when returns a class if a condition holds, or else "".
func when(condition bool, class string) string {
	if condition {
		return class
	}
	return ""
}

// current returns the attribute that marks the link to the current page; nil unless the argument is
// true.
func current(is bool) templ.Attributes {
	if is {
		return templ.Attributes{"aria-current": "page"}
	}
	return nil
}

func currentStep(is bool) templ.Attributes {
	if is {
		return templ.Attributes{"aria-current": "step"}
	}
	return nil
}

// toneClass returns a tone's class in the style sheet.
func toneClass(t fleet.Tone) string {
	return [...]string{fleet.Plain: "plain", fleet.Bold: "bold", fleet.Dim: "dim", fleet.Good: "good",
		fleet.Warn: "warn", fleet.Bad: "bad"}[t]
}

// rect is a part of a bar; x and width are in nodes.
type rect struct{ class, x, width string }

// box returns the SVG view box of a bar or line with n parts.
func box(n int) string { return fmt.Sprintf("0 0 %d 1", max(1, n)) }

// boxes returns the parts of a bar of shares: the target first, so that it grows from the left, and
// nodes that run nothing last.
func boxes(all []share) (rects []rect) {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b share) int {
		switch {
		case a.Class == b.Class:
			return 0
		case a.Class == "v0", b.Class == "vn":
			return -1
		case b.Class == "v0", a.Class == "vn":
			return 1
		}
		return 0
	})
	x := 0
	for _, s := range all {
		rects = append(rects, rect{s.Class, itoa(x), itoa(s.Count)})
		x += s.Count
	}
	return rects
}

// describeShares describes a bar of shares in words.
func describeShares(all []share) string {
	text := "Runs"
	for i, s := range all {
		if i > 0 {
			text += ","
		}
		text += fmt.Sprintf(" %s on %d", s.Name, s.Count)
	}
	return text
}

// boxes returns the parts of a rollout's bar: converged nodes, then nodes that change or have yet to go back, then
// failed nodes.
func (p *progress) boxes() []rect {
	moving := max(0, p.Admitted-p.Converged-p.Failed)
	if p.back() {
		moving = max(0, p.Following-p.Converged-p.Failed)
	}
	return []rect{
		{"done", "0", itoa(p.Converged)}, {"moving", itoa(p.Converged), itoa(moving)},
		{"failed", itoa(p.Converged + moving), itoa(p.Failed)},
	}
}

// short returns the rollout in numbers.
func (p *progress) short() string {
	if p.back() {
		return fmt.Sprintf("%d of %d back on stable", p.Converged, p.Following)
	}
	if moving := p.Admitted - p.Converged - p.Failed; moving > 0 {
		return fmt.Sprintf("%d of %d, %d on the way", p.Converged, p.Following, moving)
	}
	return fmt.Sprintf("%d of %d", p.Converged, p.Following)
}

// say describes the rollout's bar in words.
func (p *progress) say() string {
	if p.back() {
		return p.short()
	}
	return fmt.Sprintf("%d of %d nodes converged, %d admitted, %d failed", p.Converged, p.Following, p.Admitted,
		p.Failed)
}
