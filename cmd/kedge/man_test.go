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
		body = strings.ReplaceAll(body, "\n## ", "\n# ")
		name := filepath.Join(dir, "man7", "kedge-"+topic.Name+".7")
		if err := os.WriteFile(name, md2man.Render([]byte(head+body)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
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
