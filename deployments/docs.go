package deployments

import (
	"embed"
	"path"
	"strings"
)

// docs are the pages of the manual: docs/TOPIC.md, each with a heading as its first line.
//
//go:embed docs/*.md
var docs embed.FS

// formats is the text of doc.go, whose package comment is the reference of formats; see sections.
//
//go:embed doc.go
var formats string

// sections are the pages of the reference, by the headings in the package comment.
var sections = []struct{ topic, heading, title string }{
	{"manifest", "Manifest", "Manifest: each field, its default, an example"},
	{"unit", "Unit file", "Unit file: each field, its default, an example"},
	{"kedge.yaml", "kedge.yaml", "kedge.yaml: what holds for the whole deployments repo"},
	{"agent.yaml", "agent.yaml", "agent.yaml: each field, its default, an example"},
	{"record", "Record", "Record: what stands at desired/ in the store"},
	{"report", "Report", "Report: what nodes write at status/"},
}

// section returns a section of the package comment as a page.
func section(heading, title string) string {
	_, text, _ := strings.Cut(formats, "\n// # "+heading+"\n")
	text, _, _ = strings.Cut(text, "\n// # ")
	text, _, _ = strings.Cut(text, "\npackage ")
	var page strings.Builder
	page.WriteString("# " + title + "\n")
	for line := range strings.Lines(text) {
		line = strings.TrimPrefix(line, "//")
		if code, ok := strings.CutPrefix(line, "\t"); ok {
			page.WriteString("    " + code)
			continue
		}
		page.WriteString(strings.TrimPrefix(line, " "))
	}
	return strings.TrimRight(page.String(), "\n") + "\n"
}

// Topic is a page of the manual.
type Topic struct {
	// Name is what follows "kedge help".
	Name string
	// Title is the page's heading.
	Title string
	// Reference is set if the page is a section of the package comment, not a file of docs.
	Reference bool
}

// Topics returns the pages of docs, ordered by name, and then those of the reference, in the order of sections.
func Topics() []Topic {
	entries, err := docs.ReadDir("docs")
	if err != nil {
		panic(err) // the directory is embedded
	}
	var topics []Topic
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".md")
		page, _ := Page(name)
		title, _, _ := strings.Cut(strings.TrimPrefix(page, "# "), "\n")
		topics = append(topics, Topic{Name: name, Title: title})
	}
	for _, s := range sections {
		topics = append(topics, Topic{Name: s.topic, Title: s.title, Reference: true})
	}
	return topics
}

// Page returns the text of a topic's page, in Markdown, and false if there is no such topic.
func Page(topic string) (string, bool) {
	for _, s := range sections {
		if s.topic == topic {
			return section(s.heading, s.title), true
		}
	}
	text, err := docs.ReadFile(path.Join("docs", topic+".md"))
	return string(text), err == nil && !strings.Contains(topic, "/")
}
