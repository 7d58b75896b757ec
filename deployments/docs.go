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

// Topic is a page of the manual.
type Topic struct {
	// Name is what follows "kedge help".
	Name string
	// Title is the page's heading.
	Title string
}

// Topics returns the pages of the manual, ordered by name.
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
	return topics
}

// Page returns the text of a topic's page, in Markdown, and false if there is no such topic.
func Page(topic string) (string, bool) {
	text, err := docs.ReadFile(path.Join("docs", topic+".md"))
	return string(text), err == nil && !strings.Contains(topic, "/")
}
