package main

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"kedge/deployments"
)

// manDir is where .ci/package wants the manual. cobra/doc, which writes it, would be 3 MB of the binary, so it is
// linked into the tests alone.
var manDir = flag.String("man", "", "write the manual's pages to this directory, for packages")

// Every command and every topic has a man page: complete, with its flags, and the same each time.
func TestManPages(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	writeMan(t, dir)
	for page, want := range map[string]string{
		"man1/kedge.1":            `kedge-status(1)`,
		"man1/kedge-wait.1":       `--commit`,
		"man7/kedge-operations.7": `Upgrade`,
	} {
		text, err := os.ReadFile(filepath.Join(dir, page))
		if err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s lacks %q: %v", page, want, err)
		}
	}
	if man, err := exec.LookPath("man"); err == nil {
		out, err := exec.Command(man, "--warnings", "-l", filepath.Join(dir, "man1", "kedge-wait.1")).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "SYNOPSIS") {
			t.Errorf("man shows %s, %v", out, err)
		}
		for page, want := range map[string]string{
			"kedge-hooks.7": "the checks must pass", "kedge-limits.7": "a pointer",
			"kedge-troubleshooting.7": "lacks permission",
		} {
			c := exec.Command(man, "-l", filepath.Join(dir, "man7", page))
			c.Env = append(os.Environ(), "MANWIDTH=80", "LC_ALL=C.UTF-8")
			out, err := c.Output()
			if err != nil || !strings.Contains(string(out), want) {
				t.Errorf("man shows of %s %s, %v", page, out, err)
			}
			for line := range strings.Lines(string(out)) {
				if strings.ContainsAny(line, "│┌") || page == "kedge-limits.7" && utf8.RuneCountInString(line) > 81 {
					t.Errorf("%s has a table that doesn't fit: %s", page, line)
				}
			}
		}
	}
}

// writeMan writes the manual's pages: section 1 has the commands, section 7 the topics.
func writeMan(t *testing.T, dir string) {
	t.Helper()
	for _, section := range []string{"man1", "man7"} {
		if err := os.MkdirAll(filepath.Join(dir, section), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	at := time.Unix(0, 0).UTC()
	if seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		at = time.Unix(seconds, 0).UTC()
	}
	for _, variable := range os.Environ() { // they are the defaults of flags
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "KEDGE_") || name == "SOURCE_DATE_EPOCH" {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	root := newRoot(&app{})
	root.DisableAutoGenTag = true
	manText(root)
	header := &doc.GenManHeader{Section: "1", Source: "kedge", Manual: "kedge", Date: &at}
	if err := doc.GenManTree(root, header, filepath.Join(dir, "man1")); err != nil {
		t.Fatal(err)
	}
	for _, topic := range deployments.Topics() {
		page, _ := deployments.Page(topic.Name)
		_, body, _ := strings.Cut(page, "\n")
		head := "% \"KEDGE-" + strings.ToUpper(topic.Name) + "\" \"7\" \"" + at.Format("Jan 2006") + "\" \"kedge\" \"kedge\"\n" +
			"# NAME\nkedge-" + topic.Name + " - " + topic.Title + "\n"
		body = manTables(strings.ReplaceAll(body, "\n## ", "\n# "))
		name := filepath.Join(dir, "man7", "kedge-"+topic.Name+".7")
		if err := os.WriteFile(name, md2man.Render([]byte(head+body)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// manTables lays tables out as kedge help does, in blocks that man leaves alone: md2man would break rows of long cells
// into several, and tbl would make most of them wider than a terminal.
func manTables(page string) string {
	const width = 80 - 7 - 4 // of a terminal, without what man and the block are indented by
	var lines []string
	var rows [][]string
	for line := range strings.SplitSeq(page, "\n") {
		if strings.HasPrefix(line, "|") {
			if strings.Trim(line, "|-: ") != "" {
				rows = append(rows, cells(line))
			}
			continue
		}
		if rows != nil {
			table := strings.NewReplacer("`", "", "**", "").Replace(tableText(rows, width))
			for row := range strings.Lines(table) {
				lines = append(lines, "    "+strings.TrimSuffix(row, "\n"))
			}
			rows = nil
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// manText prepares the long texts, which are laid out for a terminal, for Markdown: lines that are indented become
// blocks.
func manText(cmd *cobra.Command) {
	var lines []string
	for line := range strings.SplitSeq(cmd.Long, "\n") {
		if strings.HasPrefix(line, "  ") {
			line = "  " + line // four blanks make a block of code
			if n := len(lines); n > 0 && lines[n-1] != "" && !strings.HasPrefix(lines[n-1], "    ") {
				lines = append(lines, "")
			}
		}
		lines = append(lines, line)
	}
	cmd.Long = strings.Join(lines, "\n")
	for _, c := range cmd.Commands() {
		manText(c)
	}
}
