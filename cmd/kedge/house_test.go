package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors are the packages from the top down. A package imports from lower floors and from its own, and no two of
// one floor import each other in a circle: the compiler sees to that.
var floors = []string{"cmd", "sync", "policy artifact kv", "deployments"}

func floorOf(path string) int {
	room, _, _ := strings.Cut(strings.TrimPrefix(path, "kedge/"), "/")
	return slices.IndexFunc(floors, func(names string) bool { return slices.Contains(strings.Fields(names), room) })
}

// Imports run one way: cmd, sync, then policy, artifact and kv side by side, then deployments.
func TestImportsRunOneWay(t *testing.T) {
	imports := importsOf(t)
	if len(imports) < 12 {
		t.Fatalf("found %d packages", len(imports))
	}
	for from, all := range imports {
		for _, to := range all {
			above, below := floorOf(from), floorOf(to)
			room := func(path string) string { return strings.Split(path, "/")[1] }
			switch {
			case above < 0 || below < 0:
				t.Errorf("%s imports %s: one of them is in no room of floors", from, to)
			case above > below:
				t.Errorf("%s imports %s, which lies above it", from, to)
			case above == below && above > 1 && room(from) != room(to):
				t.Errorf("%s imports %s, which lies beside it", from, to)
			}
		}
	}
}

// At the top stand the rooms, go.mod, go.sum and README.md alone, dot-files aside.
func TestWhatStandsAtTheTop(t *testing.T) {
	entries, err := os.ReadDir("../..")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			got = append(got, e.Name())
		}
	}
	want := []string{"README.md", "artifact", "cmd", "deployments", "go.mod", "go.sum", "kv", "policy", "sync"}
	if !slices.Equal(got, want) {
		t.Errorf("at the top stand %v, want %v", got, want)
	}
}

// The README sends nobody to a file that isn't there any more.
func TestReadmeNamesFilesThatExist(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`((?:cmd|sync|policy|artifact|kv|deployments)/[a-z0-9_/.-]+)`").FindAllSubmatch(text, -1)
	if len(named) < 20 {
		t.Fatalf("found %d paths", len(named))
	}
	for _, m := range named {
		if _, err := os.Stat("../../" + string(m[1])); err != nil {
			t.Error(err)
		}
	}
}

// importsOf returns the packages of this module that each of its packages imports, tests aside.
func importsOf(t *testing.T) map[string][]string {
	t.Helper()
	imports := map[string][]string{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch name := d.Name(); {
		case err != nil:
			return err
		case d.IsDir() && (name == "testdata" || name != ".." && strings.HasPrefix(name, ".")):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel("../..", filepath.Dir(path))
		if err != nil {
			return err
		}
		from := "kedge/" + filepath.ToSlash(dir)
		imports[from] = append(imports[from], []string{}...)
		for _, spec := range file.Imports {
			to, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if strings.HasPrefix(to, "kedge/") && !slices.Contains(imports[from], to) {
				imports[from] = append(imports[from], to)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return imports
}
