package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	reflected "github.com/invopop/jsonschema"
	validator "github.com/santhosh-tekuri/jsonschema/v6"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/sync/fleet"
	"kedge/sync/mirror"
)

var update = flag.Bool("update", false, "write what is generated anew")

const schemaDir = "../../deployments/schemas"

// printed are what commands print with --json, by kind.
var printed = map[string]struct {
	value any
	title string
}{
	"check":   {deployments.Problems{}, "kedge check --json: what is wrong"},
	"diff":    {[]mirror.Change{}, "kedge diff --json: what a commit would write"},
	"explain": {fleet.Explanation{}, "kedge explain --json: why a node runs what it runs"},
	"history": {[]deployments.History{}, "kedge history --json: what a unit was told to run"},
	"import":  {Imports{}, "kedge import --json: what became of stretcher's manifests"},
	"node":    {fleet.NodeUnits{}, "kedge node --json: all units of a node"},
	"order":   {OrderOutcome{}, "--json of orders, pins, unpins and rollbacks: what came of it"},
	"publish": {artifact.Published{}, "kedge publish --json: what was made"},
	"status":  {fleet.Fleet{}, "kedge status --json: the fleet; with --watch one for each change, a line each"},
	"verify":  {[]artifact.Difference{}, "kedge verify --json: what differs from what was published"},
	"version": {VersionInfo{}, "kedge version --json"},
	"wait":    {WaitOutcome{}, "kedge wait --json: how it ended"},
}

// The schemas that kedge schema prints are those of the formats, as they are now.
func TestSchemas(t *testing.T) {
	want := map[string][]byte{}
	encode := func(kind string, v any) {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		if err := e.Encode(v); err != nil {
			t.Fatal(err)
		}
		want[kind] = b.Bytes()
	}
	for kind, schema := range typedSchemas(t) {
		encode(kind, schema)
	}
	r := schemaReflector(t)
	for kind, p := range printed {
		schema := r.Reflect(p.value)
		schema.Title = p.title
		encode(kind, schema)
	}
	for kind, text := range want {
		if *update {
			if err := os.WriteFile(filepath.Join(schemaDir, kind+".json"), text, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if has, _ := deployments.Schema(kind); !reflect.DeepEqual(shapeOf(t, has), shapeOf(t, text)) {
			t.Errorf("the schema of %s is not the format's: go test ./cmd/kedge -run TestSchemas -update", kind)
		}
		if compiled := compileSchema(t, kind); compiled == nil {
			t.Errorf("the schema of %s is none", kind)
		}
	}
	if kinds := deployments.SchemaKinds(); !*update && len(kinds) != len(want) {
		t.Errorf("kedge schema lists %q, %d are known here", kinds, len(want))
	}
}

// shapeOf is a schema without its descriptions: those come from comments, whose words anybody may mend.
func shapeOf(t *testing.T, schema []byte) any {
	t.Helper()
	var shape any
	if err := json.Unmarshal(schema, &shape); err != nil {
		t.Fatal(err)
	}
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if _, words := v["description"].(string); words {
				delete(v, "description")
			}
			for _, value := range v {
				walk(value)
			}
		case []any:
			for _, value := range v {
				walk(value)
			}
		}
	}
	walk(shape)
	return shape
}

// schemaReflector makes schemas of Go types: additional fields are fine, as formats grow.
func schemaReflector(t *testing.T) *reflected.Reflector {
	t.Helper()
	r := &reflected.Reflector{
		Anonymous: true, AllowAdditionalProperties: true, ExpandedStruct: true,
		Mapper: func(of reflect.Type) *reflected.Schema {
			switch of {
			case reflect.TypeFor[deployments.Pointer]():
				return &reflected.Schema{Type: "string", Description: "URL@sha256:HEX; empty: none"}
			case reflect.TypeFor[deployments.UnitID]():
				return &reflected.Schema{Type: "string", Description: "STAGE/ROLE/UNIT"}
			case reflect.TypeFor[deployments.Digest]():
				return &reflected.Schema{Type: "string", Description: "a SHA-256, in hexadecimal digits"}
			case reflect.TypeFor[time.Time]():
				return &reflected.Schema{Type: "string", Format: "date-time"}
			}
			return nil
		},
	}
	for _, dir := range strings.Fields("cmd/kedge deployments sync/fleet sync/mirror sync/migrate artifact") {
		if err := r.AddGoComments("kedge/cmd/kedge", filepath.Join("../..", dir)); err != nil {
			t.Fatal(err)
		}
	}
	r.LookupComment = func(of reflect.Type, field string) string {
		about := r.CommentMap[of.PkgPath()+"."+of.Name()]
		shown := of.Name()
		if field != "" {
			f, _ := of.FieldByName(field)
			about = r.CommentMap[of.PkgPath()+"."+of.Name()+"."+field]
			shown, _, _ = strings.Cut(f.Tag.Get("json"), ",")
		}
		about = strings.Join(strings.Fields(about), " ")
		if rest, named := strings.CutPrefix(about, field+" "); named && field != "" {
			about = shown + " " + rest
		}
		return about
	}
	return r
}

func compileSchema(t *testing.T, kind string) *validator.Schema {
	t.Helper()
	text, ok := deployments.Schema(kind)
	if !ok {
		t.Fatalf("no schema %s", kind)
	}
	document, err := validator.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("the schema of %s: %v", kind, err)
	}
	c := validator.NewCompiler()
	if err := c.AddResource(kind+".json", document); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile(kind + ".json")
	if err != nil {
		t.Fatalf("the schema of %s: %v", kind, err)
	}
	return schema
}

// validJSON holds what a command printed against its schema.
func validJSON(t *testing.T, kind, text string) {
	t.Helper()
	document, err := validator.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%s: %v in %q", kind, err, text)
	}
	if err := compileSchema(t, kind).Validate(document); err != nil {
		t.Errorf("%s is not as its schema says: %v\n%s", kind, err, text)
	}
	if strings.Contains(text, "null") {
		t.Errorf("%s: a list or an object is null:\n%s", kind, text)
	}
}
