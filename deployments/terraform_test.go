package deployments

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclparse"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"
)

// terraformTypes are the attributes and blocks of a resource, by the path of their block: of the resource itself "", of
// a block in it as "health_check". The type is as in "string", "list" or "blocks", and ends in "!" if it is required.
type terraformTypes map[string]map[string]string

// metaArguments are Terraform's own, of any resource.
var metaArguments = map[string]string{
	"for_each": "any", "count": "number", "depends_on": "list", "provider": "any", "lifecycle": "block",
}

const providerTypes = "testdata/terraform.json"

var providerPackage = flag.String(
	"provider", "", "write "+providerTypes+" from this `directory`, an unpacked @cdktf/provider-aws",
)

var (
	providerInterface = regexp.MustCompile(`(?s)export interface (\w+)[^{]*\{(.*?)\n\}`)
	providerVersion   = regexp.MustCompile(`hashicorp/aws/([0-9.]+)/`)
	providerField     = regexp.MustCompile(`#\w+ \w+#(\w+)\}[^/]*\*/\s+readonly \w+(\??): (?s:(\{.*?\}|[^;]*));`)
)

// writeProviderTypes writes the provider's types anew, of the resources that are known, from the package that publishes
// them.
func writeProviderTypes(t *testing.T) {
	t.Helper()
	known := readProviderTypes(t)
	var versions []string
	for name := range known.Resources {
		file := strings.ReplaceAll(strings.NewReplacer("data aws_", "data-aws-", "aws_", "").Replace(name), "_", "-")
		text, err := os.ReadFile(filepath.Join(*providerPackage, "lib", file, "index.d.ts"))
		if err != nil {
			t.Fatal(err)
		}
		interfaces := map[string]string{}
		for _, m := range providerInterface.FindAllStringSubmatch(string(text), -1) {
			interfaces[m[1]] = m[2]
		}
		types := terraformTypes{}
		for name, body := range interfaces {
			if strings.HasSuffix(name, "Config") {
				addProviderTypes(types, interfaces, body, "")
			}
		}
		known.Resources[name] = types
		versions = append(versions, providerVersion.FindStringSubmatch(string(text))[1])
	}
	known.Source = "the types that @cdktf/provider-aws publishes of terraform-provider-aws " + versions[0]
	if len(slices.Compact(versions)) != 1 {
		t.Fatalf("of several versions: %q", versions)
	}
	data, err := json.MarshalIndent(known, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(providerTypes, append(data, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

func addProviderTypes(types terraformTypes, interfaces map[string]string, body, path string) {
	types[path] = map[string]string{}
	for _, m := range providerField.FindAllStringSubmatch(body, -1) {
		kind := strings.TrimSuffix(m[3], " | cdktf.IResolvable")
		name, many := strings.CutSuffix(kind, "[]")
		inner, block := interfaces[name]
		switch {
		case block && many:
			kind = "blocks"
		case block:
			kind = "block"
		case many:
			kind = "list"
		case strings.HasPrefix(kind, "{"):
			kind = "map"
		}
		if m[2] == "" {
			kind += "!"
		}
		types[path][m[1]] = kind
		if block {
			addProviderTypes(types, interfaces, inner, strings.TrimPrefix(path+"."+m[1], "."))
		}
	}
}

type publishedTypes struct {
	Source    string                    `json:"source"`
	Resources map[string]terraformTypes `json:"resources"`
}

func readProviderTypes(t *testing.T) (known publishedTypes) {
	t.Helper()
	data, err := os.ReadFile(providerTypes)
	if err == nil {
		err = json.Unmarshal(data, &known)
	}
	if err != nil {
		t.Fatal(err)
	}
	return known
}

// The Terraform files are formatted as "tofu fmt" does. Every resource, block and attribute in them is one that the
// provider has, of the type that it wants, none that it requires is missing, every reference leads somewhere, and every
// variable is used.
func TestTerraform(t *testing.T) {
	t.Parallel()
	if *providerPackage != "" {
		writeProviderTypes(t)
	}
	known := readProviderTypes(t)
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
		if formatted := hclwrite.Format(file.Bytes); !bytes.Equal(formatted, file.Bytes) {
			t.Errorf("%s is not formatted: run terraform fmt or tofu fmt", name)
		}
		body := file.Body.(*hclsyntax.Body)
		for _, block := range body.Blocks {
			declared[strings.Join(append([]string{block.Type}, block.Labels...), ".")] = true
			switch block.Type {
			case "resource", "data":
				types, ok := known.Resources[strings.TrimPrefix(block.Type+" ", "resource ")+block.Labels[0]]
				if !ok {
					t.Errorf("%s: nothing is known of %s %s", block.DefRange(), block.Type, block.Labels[0])
					continue
				}
				checkTerraformBlock(t, block.Body, types, "")
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
func checkTerraformBlock(t *testing.T, body *hclsyntax.Body, types terraformTypes, path string) {
	t.Helper()
	allowed := maps.Clone(types[path])
	if path == "" {
		maps.Copy(allowed, metaArguments)
	}
	given := map[string]int{}
	for name, attribute := range body.Attributes {
		given[name]++
		if problem := terraformMistake(attribute.Expr, strings.TrimSuffix(allowed[name], "!")); problem != "" {
			t.Errorf("%s: %s at %q is %s", attribute.SrcRange, name, path, problem)
		}
	}
	for _, block := range body.Blocks {
		name, inner := block.Type, block.Body
		if name == "dynamic" {
			name, inner = block.Labels[0], block.Body.Blocks[0].Body
		}
		given[name]++
		kind := strings.TrimSuffix(allowed[name], "!")
		if kind != "block" && kind != "blocks" || kind == "block" && given[name] > 1 {
			t.Errorf("%s: block %s at %q is no block there, or the second one", block.DefRange(), name, path)
		}
		if name == "lifecycle" && path == "" {
			continue
		}
		checkTerraformBlock(t, inner, types, strings.TrimPrefix(path+"."+name, "."))
	}
	for name, kind := range allowed {
		if strings.HasSuffix(kind, "!") && given[name] == 0 {
			t.Errorf("%s: %s is missing at %q", body.SrcRange, name, path)
		}
	}
}

// terraformMistake says what is wrong with an expression for an attribute of a type, as far as it can be seen without
// the values of variables.
func terraformMistake(expr hclsyntax.Expression, kind string) string {
	is := ""
	switch e := expr.(type) {
	case *hclsyntax.TupleConsExpr, *hclsyntax.SplatExpr:
		is = "list"
	case *hclsyntax.ForExpr:
		if is = "list"; e.KeyExpr != nil {
			is = "map"
		}
	case *hclsyntax.ObjectConsExpr:
		is = "map"
	case *hclsyntax.TemplateExpr:
		is = "string"
	case *hclsyntax.LiteralValueExpr:
		is = map[cty.Type]string{cty.Number: "number", cty.Bool: "boolean"}[e.Val.Type()]
	case *hclsyntax.ConditionalExpr:
		return cmp.Or(terraformMistake(e.TrueResult, kind), terraformMistake(e.FalseResult, kind))
	}
	switch {
	case kind == "":
		return "not known there"
	case kind == "block" || kind == "blocks":
		return "a block, and no attribute"
	case is == "" || kind == "any" || is == kind:
		return ""
	case kind == "string" && (is == "number" || is == "boolean"): // which Terraform converts
		return ""
	}
	return fmt.Sprintf("a %s, and not a %s", kind, is)
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
