package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"kedge/deployments"
)

// Every page of the manual is listed in the help and in the README, leads only to pages that exist, and fits a
// terminal of 80 columns, commands and lone long words aside.
func TestTopics(t *testing.T) {
	t.Parallel()
	help, _, _ := cli(t, "", "help")
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	commands := newRoot(&app{}).Commands()
	for _, topic := range deployments.Topics() {
		if !strings.Contains(help, "  "+topic.Name+" ") || topic.Title == "" {
			t.Errorf("kedge help doesn't list %s: %s", topic.Name, topic.Title)
		}
		if !topic.Reference && !strings.Contains(string(readme), "deployments/docs/"+topic.Name+".md") {
			t.Errorf("README.md doesn't lead to the page %s", topic.Name)
		}
		for _, c := range commands {
			if c.Name() == topic.Name {
				t.Errorf("the page %s hides the command of that name", topic.Name)
			}
		}
		page, _ := deployments.Page(topic.Name)
		for _, link := range regexp.MustCompile(`\]\(([a-z-]+)\.md[)#]`).FindAllStringSubmatch(page, -1) {
			if _, ok := deployments.Page(link[1]); !ok {
				t.Errorf("%s leads to the page %s, which isn't there", topic.Name, link[1])
			}
		}
		out, _, code := cli(t, "", "help", topic.Name)
		if code != exitDone {
			t.Errorf("kedge help %s: exit %d", topic.Name, code)
		}
		for line := range strings.Lines(out) {
			n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n"))
			if n > 80 && (!strings.HasPrefix(line, "    ") || definition.MatchString(line) && topic.Reference) &&
				strings.Contains(strings.TrimSpace(line), " ") {
				t.Errorf("kedge help %s: a line of %d columns: %s", topic.Name, n, line)
			}
		}
	}
}

// A page reads well without its Markdown: nothing of a table, an item or a block of commands is lost.
func TestPageText(t *testing.T) {
	t.Parallel()
	page := "# A page\n\nSome **words** that go on\nand on, see [limits](limits.md) and [Git](https://git-scm.com).\n\n" +
		"- an item that is longer than\n  a line\n- another\n\n```sh\nkedge status   # as it is\n```\n\n" +
		"    # a comment\n    list:\n      - one\n        more: | text\n\n    name  what is too long for one line\n\n" +
		"| name | meaning |\n| --- | --- |\n| a | short \\| b |\n\n## Next\n\n| n | m |\n|---|---|\n| key | what does not fit into a line at all |\n"
	want := "A PAGE\n\nSome words that go on and on, see\nlimits (kedge help limits) and Git\n(https://git-scm.com).\n\n" +
		"- an item that is longer than a line\n- another\n\n    kedge status   # as it is\n\n" +
		"    # a comment\n    list:\n      - one\n        more: | text\n\n" +
		"    name  what is too long for one\n          line\n\n" +
		"  name  meaning\n  a     short | b\n\nNEXT\n\n  n\n    m\n  key\n    what does not fit into a line at\n    all\n"
	if got := pageText(page, 36); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// What the page on troubleshooting quotes as a symptom is what kedge says: a message that is reworded is found here.
func TestSymptomsAreSaid(t *testing.T) {
	t.Parallel()
	// Consul's, and Linux'
	others := []string{"ACL not found", "lacks permission", "permission denied", "no space left on device"}
	var said strings.Builder
	err := filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		said.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	page, _ := deployments.Page("troubleshooting")
	quoted := 0
	for line := range strings.Lines(page) {
		symptom, _, ok := strings.Cut(strings.TrimPrefix(line, "| "), " | ")
		if !ok || !strings.HasPrefix(line, "| ") {
			continue
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(symptom, -1) {
			quoted++
			if !strings.HasPrefix(m[1], "kedge ") && !slices.Contains(others, m[1]) && !strings.Contains(said.String(), m[1]) {
				t.Errorf("the page on troubleshooting quotes %q, which kedge doesn't say", m[1])
			}
		}
	}
	if quoted < 20 {
		t.Errorf("the page on troubleshooting quotes %d messages", quoted)
	}
}
