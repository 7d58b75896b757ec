package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"kedge/deployments"
)

// helpTopics lists the pages of the manual, for the end of kedge's help.
func helpTopics() string {
	var b strings.Builder
	b.WriteString("\nTopics (kedge help TOPIC)\n")
	for _, t := range deployments.Topics() {
		fmt.Fprintf(&b, "  %-16s %s\n", t.Name, t.Title)
	}
	return b.String()
}

// noPage returns the error for a name that neither a command nor a page has. The error names similar ones, if there are
// any.
func noPage(root *cobra.Command, name string) error {
	near := root.SuggestionsFor(name)
	if topic := deployments.Nearest(name, func(yield func(string) bool) {
		for _, t := range deployments.Topics() {
			if !yield(t.Name) {
				return
			}
		}
	}); topic != "" && !slices.Contains(near, topic) {
		near = append(near, topic)
	}
	if len(near) > 0 {
		return usagef("no command or topic %q: did you mean %s?", name, strings.Join(near, " or "))
	}
	return hintError{usagef("no command or topic %q", name), "kedge help lists them"}
}

var pageLink = regexp.MustCompile(`\[([^\]]+)\]\(([^)]+)\)`)

// pageText renders a page of the manual, which is Markdown, for a terminal. Headings lose their marks, paragraphs and
// items are wrapped at width, blocks of commands are indented, and tables become lists if they are too wide.
func pageText(page string, width int) string {
	page = strings.ReplaceAll(page, "**", "")
	page = pageLink.ReplaceAllStringFunc(page, func(link string) string {
		m := pageLink.FindStringSubmatch(link)
		if topic, ok := strings.CutSuffix(m[2], ".md"); ok && !strings.Contains(topic, "/") {
			return m[1] + " (kedge help " + topic + ")"
		}
		return m[1] + " (" + m[2] + ")"
	})
	var b strings.Builder
	var open []string // lines of the current paragraph or item
	var table [][]string
	flush := func() {
		if len(open) > 0 {
			b.WriteString(wrapItem(strings.Join(open, " "), width) + "\n")
		}
		if len(table) > 0 {
			b.WriteString(tableText(table, width))
		}
		open, table = nil, nil
	}
	fenced := false
	for line := range strings.Lines(page) {
		line = strings.TrimRight(line, "\n")
		text := strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(text, "```"):
			flush()
			fenced = !fenced
		case fenced:
			b.WriteString(strings.TrimRight("    "+line, " ") + "\n")
		case strings.HasPrefix(line, "    ") && text != "" && len(open) == 0: // indented code, whatever it contains
			flush()
			if m := definition.FindStringSubmatch(line); m != nil && utf8.RuneCountInString(line) > width {
				line = wrapWords(m[1], m[2], width)
			}
			b.WriteString(line + "\n")
		case text == "":
			flush()
			b.WriteString("\n")
		case strings.HasPrefix(text, "#"):
			flush()
			title := strings.TrimLeft(text, "# ")
			if strings.HasPrefix(text, "# ") || strings.HasPrefix(text, "## ") {
				title = strings.ToUpper(title)
			}
			b.WriteString(title + "\n")
		case strings.HasPrefix(text, "|"):
			if len(open) > 0 {
				flush()
			}
			table = append(table, cells(text))
		case isItem(text):
			flush()
			open = []string{line}
		default:
			open = append(open, text)
		}
	}
	flush()
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// definition matches a line of a table of fields: a name, at least two blanks, and what the field means.
var definition = regexp.MustCompile(`^( +[^ #].*?  +)([^ #].*)$`)

var itemMark = regexp.MustCompile(`^([-*]|[0-9]+\.) `)

func isItem(text string) bool { return itemMark.MatchString(text) }

// wrapItem wraps a paragraph or an item at width. Further lines are indented to where its text begins.
func wrapItem(text string, width int) string {
	rest := strings.TrimLeft(text, " ")
	indent := len(text) - len(rest)
	mark := itemMark.FindString(rest)
	return wrapWords(strings.Repeat(" ", indent)+mark, strings.TrimPrefix(rest, mark), width)
}

// wrapWords wraps text at width. The first line begins with the text first, and the others begin with as many blanks.
func wrapWords(first, text string, width int) string {
	var b strings.Builder
	b.WriteString(first)
	column := len(first)
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case column+1+n > width:
			b.WriteString("\n" + strings.Repeat(" ", len(first)))
			column = len(first)
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	return b.String()
}

func cells(row string) []string {
	row = strings.ReplaceAll(strings.Trim(row, "|"), `\|`, "\x00")
	var cells []string
	for cell := range strings.SplitSeq(row, "|") {
		cells = append(cells, strings.ReplaceAll(strings.TrimSpace(cell), "\x00", "|"))
	}
	return cells
}

// tableText aligns a table's columns. If they don't fit, each row becomes its first cell with the others below.
func tableText(rows [][]string, width int) string {
	var widths []int
	body := rows[:0:0]
	for _, row := range rows {
		if strings.Trim(strings.Join(row, ""), "-: ") == "" {
			continue // the line below the head, or an empty head
		}
		body = append(body, row)
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	total := 2 * len(widths)
	for _, w := range widths {
		total += w
	}
	var b strings.Builder
	for _, row := range body {
		var line string
		if total <= width {
			for i, cell := range row {
				line += cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2)
			}
			b.WriteString("  " + strings.TrimRight(line, " ") + "\n")
			continue
		}
		b.WriteString("  " + row[0] + "\n")
		for _, cell := range row[1:] {
			if cell != "" {
				b.WriteString(wrapWords("    ", cell, width) + "\n")
			}
		}
	}
	return b.String()
}
