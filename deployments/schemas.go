package deployments

import (
	"embed"
	"path"
	"strings"
)

// schemas has the JSON Schemas: schemas/KIND.json. go test ./cmd/kedge -run TestSchemas -update
// generates them. A test checks that the schemas of what people type agree with the parsers.
//
//go:embed schemas/*.json
var schemas embed.FS

// SchemaKinds returns the kinds of documents that have a schema: what people type, then what commands print.
func SchemaKinds() []string {
	kinds := []string{"manifest", "unit", "kedge.yaml", "agent.yaml"}
	typed := len(kinds)
	entries, err := schemas.ReadDir("schemas")
	if err != nil {
		panic(err) // the directory is embedded
	}
	for _, e := range entries {
		kind := strings.TrimSuffix(e.Name(), ".json")
		known := false
		for _, k := range kinds[:typed] {
			known = known || k == kind
		}
		if !known {
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// Schema returns the JSON Schema of a kind of document, and false if there is no such kind.
func Schema(kind string) ([]byte, bool) {
	text, err := schemas.ReadFile(path.Join("schemas", kind+".json"))
	return text, err == nil && !strings.Contains(kind, "/")
}
