package deployments

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// terraformNames are the names that the provider's manual has for a resource, by the path of their block: of the
// resource itself "", of a block in it as "health_check".
type terraformNames map[string][]string

// metaArguments are Terraform's own, of any resource.
var metaArguments = []string{"for_each", "count", "depends_on", "provider", "lifecycle"}

// Every resource, block and attribute of the Terraform files is one that the provider's manual has, every reference
// leads somewhere, and every variable is used.
func TestTerraform(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/terraform.json")
	if err != nil {
		t.Fatal(err)
	}
	var known struct {
		Resources map[string]terraformNames `json:"resources"`
	}
	if err := json.Unmarshal(data, &known); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("terraform/*.tf")
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	parser := hclparse.NewParser()
	declared, used := map[string]bool{}, map[string]string{}
	for _, name := range files {
		file, problems := parser.ParseHCLFile(name)
		if problems.HasErrors() {
			t.Fatal(problems)
		}
		body := file.Body.(*hclsyntax.Body)
		for _, block := range body.Blocks {
			declared[strings.Join(append([]string{block.Type}, block.Labels...), ".")] = true
			switch block.Type {
			case "resource", "data":
				names, ok := known.Resources[strings.TrimPrefix(block.Type+" ", "resource ")+block.Labels[0]]
				if !ok {
					t.Errorf("%s: nothing is known of %s %s", block.DefRange(), block.Type, block.Labels[0])
					continue
				}
				checkTerraformBlock(t, block.Body, names, "")
			case "locals":
				for local := range block.Body.Attributes {
					declared["local."+local] = true
				}
			}
		}
		for place, reference := range terraformReferences(body) {
			used[reference] = place
		}
	}
	for _, reference := range slices.Sorted(maps.Keys(used)) {
		if !declared[reference] {
			t.Errorf("%s: %s is not declared", used[reference], reference)
		}
	}
	for name := range declared {
		if strings.HasPrefix(name, "variable.") && used[name] == "" {
			t.Errorf("%s is not used", name)
		}
	}
}

// checkTerraformBlock checks a block at a path of its resource. Terraform's dynamic blocks count as what they make.
func checkTerraformBlock(t *testing.T, body *hclsyntax.Body, names terraformNames, path string) {
	t.Helper()
	allowed := names[path]
	if path == "" {
		allowed = append(slices.Clone(allowed), metaArguments...)
	}
	for name, attribute := range body.Attributes {
		if !slices.Contains(allowed, name) {
			t.Errorf("%s: no attribute %s at %q", attribute.SrcRange, name, path)
		}
	}
	for _, block := range body.Blocks {
		name, inner := block.Type, block.Body
		if name == "dynamic" {
			name, inner = block.Labels[0], block.Body.Blocks[0].Body
		}
		if !slices.Contains(allowed, name) {
			t.Errorf("%s: no block %s at %q", block.DefRange(), name, path)
		}
		if name == "lifecycle" && path == "" {
			continue
		}
		checkTerraformBlock(t, inner, names, strings.TrimPrefix(path+"."+name, "."))
	}
}

// terraformReferences returns what a file refers to, by place.
func terraformReferences(body *hclsyntax.Body) map[string]string {
	found := map[string]string{}
	// Names that iterators of dynamic blocks and for expressions have.
	iterators := []string{"each", "count", "path", "self", "terraform"}
	var variables []hcl.Traversal
	_ = hclsyntax.VisitAll(body, func(n hclsyntax.Node) hcl.Diagnostics {
		switch n := n.(type) {
		case *hclsyntax.Block:
			if n.Type == "dynamic" {
				iterators = append(iterators, n.Labels[0])
			}
		case *hclsyntax.Attribute:
			variables = append(variables, hclsyntax.Variables(n.Expr)...)
		}
		return nil
	})
	for _, v := range variables {
		parts := []string{v.RootName()}
		for _, step := range v[1:] {
			if attribute, ok := step.(hcl.TraverseAttr); ok {
				parts = append(parts, attribute.Name)
			}
		}
		var reference string
		switch {
		case slices.Contains(iterators, parts[0]) || len(parts) < 2 && !strings.HasPrefix(parts[0], "aws_"):
			continue // of lifecycle and of variables' types, too
		case parts[0] == "var":
			reference = "variable." + parts[1]
		case parts[0] == "local":
			reference = "local." + parts[1]
		case parts[0] == "data":
			reference = strings.Join(parts[:3], ".")
		default:
			reference = "resource." + strings.Join(parts[:2], ".")
		}
		found[v.SourceRange().String()] = reference
	}
	return found
}
