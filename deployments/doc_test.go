package deployments

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

// reference returns the sections of the package comment by their headings.
func reference(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "doc.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, section := range strings.Split(file.Doc.Text(), "\n# ")[1:] {
		heading, text, _ := strings.Cut(section, "\n")
		sections[heading] = text
	}
	return sections
}

// exampleOf returns the indented block that follows "Example of ..." in a section.
func exampleOf(t *testing.T, section string) string {
	t.Helper()
	_, rest, found := strings.Cut(section, "\nExample of ")
	if !found {
		t.Fatal("the section has no example")
	}
	_, rest, _ = strings.Cut(rest, "\n\n")
	var example strings.Builder
	for line := range strings.Lines(rest) {
		if !strings.HasPrefix(line, "\t") {
			break
		}
		example.WriteString(strings.TrimPrefix(line, "\t"))
	}
	return example.String()
}

// Each example of the reference is read as kedge reads it.
func TestReferenceExamples(t *testing.T) {
	t.Parallel()
	load := func(name string) func(string) error {
		return func(text string) error {
			files := fstest.MapFS{name: {Data: []byte(text)}}
			_, err := Load(files)
			return err
		}
	}
	for heading, parse := range map[string]func(string) error{
		"Manifest": func(text string) error {
			m, err := ParseManifest([]byte(text), "s3://acme-releases/web/1.4.2/manifest.yaml", os.LookupEnv)
			if err == nil && (m.Dest != "/srv/app" || len(m.Commands.Post) != 1 || len(m.Health.Checks) != 1) {
				t.Errorf("the manifest is %+v", m)
			}
			return err
		},
		"Unit file":    load("prod/web/app.yaml"),
		"kedge.yaml":   load(SettingsFile),
		"Pin":          func(text string) error { _, err := ParsePin([]byte(text)); return err },
		"Order":        func(text string) error { _, err := ParseOrder([]byte(text)); return err },
		"Record":       func(text string) error { _, err := ParseRecord([]byte(text)); return err },
		"Report":       func(text string) error { _, err := ParseReport([]byte(text)); return err },
		"History":      func(text string) error { _, err := ParseHistory([]byte(text)); return err },
		"Mirror state": func(text string) error { _, err := ParseMirrorState([]byte(text)); return err },
	} {
		t.Run(heading, func(t *testing.T) {
			if err := parse(exampleOf(t, reference(t)[heading])); err != nil {
				t.Error(err)
			}
		})
	}
}

// Each field that a format has stands in its section of the reference, with a line of its own, and no other does.
func TestReferenceHasEveryField(t *testing.T) {
	t.Parallel()
	read := fieldsRead(t)
	tags := func(values ...any) (names []string) {
		for _, v := range values {
			for field := range reflect.TypeOf(v).Fields() {
				if field.Anonymous {
					continue // its fields are named by its own value
				}
				name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
				names = append(names, name)
			}
		}
		return names
	}
	want := map[string][]string{
		"Manifest": slices.Concat(read["read"], read["blob"], read["deltas"], read["commands"], read["commandList"],
			read["health"], read["check"]),
		"Unit file":    slices.Concat(read["readUnit"], read["rollout"]),
		"kedge.yaml":   slices.Concat(read["settings"], read["freeze"]),
		"Pin":          read["ParsePin"],
		"Order":        read["ParseOrder"],
		"Record":       tags(Record{}, Progress{}),
		"Report":       tags(Report{}, UnitReport{}),
		"History":      tags(History{}, PastPin{}, Pin{}, PastOrder{}, Order{}),
		"Mirror state": tags(MirrorState{}),
	}
	line := regexp.MustCompile(`(?m)^\t([a-z0-9_]+(?:, [a-z0-9_]+)*)  +\S`)
	for heading, section := range reference(t) {
		if heading == "agent.yaml" { // its fields are cmd/kedge's
			continue
		}
		if len(want[heading]) == 0 {
			t.Errorf("section %q: nothing is known of its fields", heading)
		}
		var has []string
		for _, m := range line.FindAllStringSubmatch(section, -1) {
			has = append(has, strings.Split(m[1], ", ")...)
		}
		for _, name := range want[heading] {
			if !slices.Contains(has, name) {
				t.Errorf("section %q lacks a line for the field %s", heading, name)
			}
		}
		for _, name := range has {
			if !slices.Contains(want[heading], name) {
				t.Errorf("section %q has a line for %s, which is no field", heading, name)
			}
		}
	}
}

// fieldsRead returns the names of the fields that each function of the package reads with reader.fields.
func fieldsRead(t *testing.T) map[string][]string {
	t.Helper()
	read := map[string][]string{}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(f, func(n ast.Node) bool {
				lit, ok := n.(*ast.CompositeLit)
				if !ok {
					return true
				}
				m, ok := lit.Type.(*ast.MapType)
				if !ok {
					return true
				}
				if _, ok := m.Value.(*ast.FuncType); !ok {
					return true
				}
				for _, e := range lit.Elts {
					if key, ok := e.(*ast.KeyValueExpr).Key.(*ast.BasicLit); ok {
						field, err := strconv.Unquote(key.Value)
						if err != nil {
							t.Fatal(err)
						}
						read[f.Name.Name] = append(read[f.Name.Name], field)
					}
				}
				return true
			})
		}
	}
	return read
}

// The defaults that the reference names are those that hold.
func TestReferenceDefaults(t *testing.T) {
	t.Parallel()
	sections := reference(t)
	for _, c := range []struct {
		section, field, value string
	}{
		{"Manifest", "keep", strconv.Itoa(defaultKeep)},
		{"Manifest", "timeout", short(defaultHealthTimeout)},
		{"Manifest", "every", short(defaultHealthEvery)},
		{"Manifest", "failures", strconv.Itoa(defaultHealthFailures)},
		{"Manifest", "interval", short(defaultCheckInterval)},
		{"Manifest", "timeout", short(defaultCheckTimeout)},
		{"Unit file", "deadline", short(defaultDeadline)},
		{"kedge.yaml", "max_removed", strconv.Itoa(defaultMaxRemoved)},
	} {
		line := regexp.MustCompile(`(?m)^\t` + c.field + `  .*\(` + regexp.QuoteMeta(c.value) + `\)$`)
		if !line.MatchString(sections[c.section]) {
			t.Errorf("section %q: no line of %s says (%s)", c.section, c.field, c.value)
		}
	}
}

// short writes a duration as people do: 10m, not 10m0s.
func short(d time.Duration) string {
	if d > time.Minute && d%time.Minute == 0 {
		return strconv.Itoa(int(d/time.Minute)) + "m"
	}
	return strconv.Itoa(int(d/time.Second)) + "s"
}
