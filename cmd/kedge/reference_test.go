package main

import (
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The reference of agent.yaml in package deployments has a line for each field, each field is a flag as well, and its
// example is read.
func TestReferenceOfAgentYAML(t *testing.T) {
	t.Parallel()
	file, err := parser.ParseFile(token.NewFileSet(), "../../deployments/doc.go", nil,
		parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(file.Doc.Text(), "\n# agent.yaml\n")
	section, _, _ = strings.Cut(section, "\n# ")
	var has, want []string
	for _, m := range regexp.MustCompile(`(?m)^\t([a-z0-9_]+)  +\S`).FindAllStringSubmatch(section, -1) {
		has = append(has, m[1])
	}
	flags := (&app{}).agentCommand().Flags()
	for field := range reflect.TypeFor[agentConfig]().Fields() {
		name := field.Tag.Get("yaml")
		want = append(want, name)
		if flags.Lookup(strings.ReplaceAll(name, "_", "-")) == nil {
			t.Errorf("%s is no flag", name)
		}
	}
	for _, name := range want {
		if !slices.Contains(has, name) {
			t.Errorf("no line for %s", name)
		}
	}
	for _, name := range has {
		if !slices.Contains(want, name) {
			t.Errorf("a line for %s, which is no field", name)
		}
	}

	_, example, _ := strings.Cut(section, "Example of agent.yaml:\n\n")
	example, _, _ = strings.Cut(example, "\n\n")
	path := filepath.Join(t.TempDir(), "agent.yaml")
	text := strings.ReplaceAll(strings.TrimPrefix(example, "\t"), "\n\t", "\n")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	conf, err := readAgentConfig(path, origins{})
	if err != nil || conf.Stage != "prod" || !slices.Equal(conf.Roles, []string{"web"}) {
		t.Errorf("the example is read as %+v, %v", conf, err)
	}
}
