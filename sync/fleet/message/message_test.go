package message

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strconv"
	"strings"
	"testing"

	"kedge/deployments"
)

// Every reason code has words for people, with and without its facts, and whatever the facts hold is one clean line.
func TestEveryReasonHasWords(t *testing.T) {
	source, err := os.ReadFile("../../../deployments/reason.go")
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.ParseFile(token.NewFileSet(), "reason.go", source, 0)
	if err != nil {
		t.Fatal(err)
	}
	known := map[deployments.Reason]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 || !strings.HasPrefix(spec.Names[0].Name, "Reason") {
			return true
		}
		code, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		known[deployments.Reason(code)] = true
		return true
	})
	if len(known) < 30 {
		t.Fatalf("reason.go has %d codes", len(known))
	}
	all := deployments.Facts{"admitted": "", "of": "", "failed": "", "limit": "", "nodes": "", "known": "", "live": "", "who": ""}
	for name := range all {
		all[name] = "evil\x1b[31m\nline"
	}
	for _, pattern := range texts {
		for _, name := range placeholder.FindAllStringSubmatch(pattern, -1) {
			all[name[1]] = "evil\x1b[31m\nline"
		}
	}
	for code := range known {
		if texts[code] == "" && Text(code, nil) == string(code) {
			t.Errorf("%s has no words: add them to texts, or to rolloutText", code)
		}
		bare, full := Text(code, nil), Text(code, all)
		for _, text := range []string{bare, full} {
			if text == "" || strings.ContainsAny(text, "{}\x1b\n") || strings.HasSuffix(text, ": ") {
				t.Errorf("%s: %q", code, text)
			}
		}
		if len(placeholder.FindAllString(texts[code], -1)) > 0 && !strings.Contains(full, "evil") {
			t.Errorf("%s leaves its facts out: %q", code, full)
		}
	}
	for code := range texts {
		if !known[code] {
			t.Errorf("texts has %q, which is no reason", code)
		}
	}
}

func TestText(t *testing.T) {
	for want, c := range map[string]struct {
		reason deployments.Reason
		facts  deployments.Facts
	}{
		"frozen by xmas until 2026-12-27 00:00Z": {deployments.ReasonFrozen, deployments.Facts{"window": "xmas", "until": "2026-12-27T00:00:00Z"}},
		"3 of 9 nodes admitted":                  {deployments.ReasonRolling, deployments.Facts{"admitted": "3", "of": "9"}},
		"held until 2026-12-27 00:00Z (peak)":    {deployments.ReasonHeld, deployments.Facts{"until": "2026-12-27T00:00:00Z", "reason": "peak"}},
		"waits for another unit of its role":     {deployments.ReasonDependency, nil},
		"FromTheFuture: boom":                    {"FromTheFuture", deployments.Facts{"error": "boom"}},
		"pinned by {by} (a [b] {name})":          {deployments.ReasonPinned, deployments.Facts{"by": "{by}", "reason": "a [b] {name}"}},
	} {
		if got := Text(c.reason, c.facts); got != want {
			t.Errorf("%s: %q, want %q", c.reason, got, want)
		}
	}
}

// Where a rollout waits for a person, the hint names the command that lets it go on.
func TestHint(t *testing.T) {
	id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
	for reason, want := range map[deployments.Reason]string{
		deployments.ReasonAwaitingApproval: "kedge promote prod/web/app",
		deployments.ReasonPaused:           "kedge resume prod/web/app",
		deployments.ReasonTooManyFailed:    "kedge retry prod/web/app",
		deployments.ReasonFrozen:           "kedge promote prod/web/app",
		deployments.ReasonUnhealthy:        "kedge rollback prod/web/app",
		deployments.ReasonPinned:           "kedge unpin prod/web/app --node web-1",
	} {
		if got := Hint(id, "web-1", reason); !strings.Contains(got, want) {
			t.Errorf("%s: %q lacks %q", reason, got, want)
		}
	}
}
