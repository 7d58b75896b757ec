package fleet

import (
	"slices"
	"strings"
	"unicode/utf8"

	"kedge/sync/fleet/message"
)

// Tone is the meaning of a text, shown as a colour.
type Tone uint8

// The tones.
const (
	Plain Tone = iota
	Bold
	Dim
	Good
	Warn
	Bad
)

// escapes are the terminal's escape sequences, by tone.
var escapes = [...]string{
	Plain: "",
	Bold:  "\x1b[1m",
	Dim:   "\x1b[2m",
	Good:  "\x1b[32m",
	Warn:  "\x1b[33m",
	Bad:   "\x1b[31m",
}

const reset = "\x1b[0m"

// Text is a text with its tone. It must contain no control characters but line breaks: whoever makes one cleans
// untrusted text first, as CleanLines does.
type Text struct {
	Text string
	Tone Tone
}

// printer lays text out in lines of at most opt.Width characters.
type printer struct {
	opt TableOptions
	b   strings.Builder
}

func (p *printer) paint(s Tone, text string) string {
	if !p.opt.Color || s == Plain || text == "" {
		return text
	}
	return escapes[s] + text + reset
}

func (p *printer) raw(line string) {
	p.b.WriteString(strings.ReplaceAll(line, unbroken, " ") + "\n")
}

// unbroken is a blank at which wrap doesn't break a line.
const unbroken = "\x1f"

// align formats rows as lines with aligned columns, each line beginning with indent. If lines are wider than the
// terminal, it clips the cells of the widest columns. Columns whose indexes are in firm are clipped last.
func (p *printer) align(indent string, rows [][]Text, firm ...int) []string {
	if len(rows) == 0 {
		return nil
	}
	wide, total := columns(rows)
	if total += len(indent); p.opt.Width > 0 {
		const narrowest = 7
		for ; total > p.opt.Width; total-- {
			widest := -1
			for _, last := range []bool{false, true} {
				for i := range wide {
					if slices.Contains(firm, i) == last && wide[i] > narrowest && (widest < 0 || wide[i] > wide[widest]) {
						widest = i
					}
				}
				if widest >= 0 {
					break
				}
			}
			if widest < 0 {
				break
			}
			wide[widest]--
		}
	}
	var lines []string
	for _, row := range rows {
		var b strings.Builder
		b.WriteString(indent)
		pad := 0
		for i, c := range row {
			text := clip(c.Text, wide[i])
			if text != "" {
				b.WriteString(strings.Repeat(" ", pad) + p.paint(c.Tone, text))
				pad = 0
			}
			pad += wide[i] - utf8.RuneCountInString(text) + gap
		}
		lines = append(lines, b.String())
	}
	return lines
}

// gap is the space between two columns.
const gap = 2

// columns returns the width of each column, and the total width including gaps. There must be at least one row.
func columns(rows [][]Text) (wide []int, total int) {
	wide = make([]int, len(rows[0]))
	for _, row := range rows {
		for i, c := range row {
			wide[i] = max(wide[i], utf8.RuneCountInString(c.Text))
		}
	}
	total = gap * (len(wide) - 1)
	for _, n := range wide {
		total += n
	}
	return wide, total
}

// wrap writes head and then text in tone s. Lines that are too wide are broken between words. Lines after the first are
// indented by indent columns.
func (p *printer) wrap(head string, indent int, text string, s Tone) {
	column := width(head)
	line, empty := head, true
	flush := func() {
		p.raw(strings.TrimRight(line, " "))
		line, column, empty = strings.Repeat(" ", indent), indent, true
	}
	for i, part := range strings.Split(text, "\n") {
		if i > 0 {
			flush()
		}
		for _, word := range strings.Fields(part) {
			n := width(word)
			if p.opt.Width > 0 && !empty && column+1+n > p.opt.Width {
				flush()
			}
			if !empty {
				line += " "
				column++
			}
			line += p.paint(s, word)
			column += n
			empty = false
		}
	}
	p.raw(strings.TrimRight(line, " "))
}

// width returns a text's width in columns, one for each character. Escape sequences have no width.
func width(s string) (n int) {
	escape := false
	for _, r := range s {
		switch {
		case r == '\x1b':
			escape = true
		case escape:
			escape = r != 'm'
		default:
			n++
		}
	}
	return n
}

// clip cuts text to n columns, with … at its end if anything was cut.
func clip(text string, n int) string {
	if utf8.RuneCountInString(text) <= n {
		return text
	}
	return string([]rune(text)[:max(0, n-1)]) + "…"
}

// CleanLines replaces control characters, and those that change a line's direction, by blanks, but keeps line breaks.
func CleanLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = message.Clean(lines[i])
	}
	return strings.Join(lines, "\n")
}

// Clean returns a text from an untrusted source as one line without control characters, of at most n columns.
func Clean(s string, n int) string { return clip(message.OneLine(s), n) }

// Wrap breaks each line of text that exceeds width columns, between words but never inside a command. It indents
// continuation lines by two columns more than their line. A width of 0 changes nothing.
func Wrap(text string, width int) string {
	if width == 0 {
		return text
	}
	p := &printer{opt: TableOptions{Width: width}}
	for line := range strings.SplitSeq(text, "\n") {
		rest := strings.TrimLeft(line, " ")
		indent := len(line) - len(rest)
		p.wrap(line[:indent], indent+2, keepCommandsWhole(rest), Plain)
	}
	return strings.TrimSuffix(p.b.String(), "\n")
}
