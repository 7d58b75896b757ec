package deployments

import (
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The manual's table of limits says what the constants say.
func TestLimitsOfTheManual(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	packages := map[string]map[string]ast.Expr{}
	rows := 0
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if len(cells) != 4 || !strings.HasPrefix(cells[3], "`") {
			continue
		}
		rows++
		dir, name, _ := strings.Cut(strings.Trim(cells[3], "` |"), " ")
		if packages[dir] == nil {
			packages[dir] = constantsIn(t, filepath.Join("..", dir))
		}
		expr := packages[dir][name]
		if expr == nil {
			t.Errorf("%s: package %s has no constant %s", cells[0], dir, name)
			continue
		}
		got, exact := constant.Int64Val(constant.ToInt(evaluate(t, expr, packages[dir])))
		if want := limitOf(t, cells[1]); !exact || got != want {
			t.Errorf("%s: the manual says %s (%d), and %s.%s is %d", cells[0], cells[1], want, dir, name, got)
		}
	}
	if rows < 40 {
		t.Errorf("the table has %d rows", rows)
	}
}

// limitOf reads 7, 64 KiB or 10m.
func limitOf(t *testing.T, s string) int64 {
	t.Helper()
	if d, err := time.ParseDuration(s); err == nil {
		return int64(d)
	}
	number, unit, _ := strings.Cut(s, " ")
	n, err := strconv.ParseInt(number, 10, 64)
	factor, known := map[string]int64{"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
	if err != nil || !known {
		t.Fatalf("%q is no limit", s)
	}
	return n * factor
}

// constantsIn gives the constants of a package by name.
func constantsIn(t *testing.T, dir string) map[string]ast.Expr {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v: %v", dir, err, fs.ErrNotExist)
	}
	found := map[string]ast.Expr{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok || gen.Tok != token.CONST {
				continue
			}
			for _, spec := range gen.Specs {
				value := spec.(*ast.ValueSpec)
				for i, name := range value.Names {
					if i < len(value.Values) {
						found[name.Name] = value.Values[i]
					}
				}
			}
		}
	}
	return found
}

func evaluate(t *testing.T, e ast.Expr, names map[string]ast.Expr) constant.Value {
	t.Helper()
	switch e := e.(type) {
	case *ast.BasicLit:
		return constant.MakeFromLiteral(e.Value, e.Kind, 0)
	case *ast.ParenExpr:
		return evaluate(t, e.X, names)
	case *ast.Ident:
		if names[e.Name] != nil {
			return evaluate(t, names[e.Name], names)
		}
	case *ast.SelectorExpr:
		unit, ok := map[string]time.Duration{"Second": time.Second, "Minute": time.Minute, "Hour": time.Hour, "Millisecond": time.Millisecond}[e.Sel.Name]
		if ok {
			return constant.MakeInt64(int64(unit))
		}
	case *ast.BinaryExpr:
		x, y := evaluate(t, e.X, names), evaluate(t, e.Y, names)
		if e.Op == token.SHL {
			n, _ := constant.Uint64Val(y)
			return constant.Shift(x, e.Op, uint(n))
		}
		return constant.BinaryOp(x, e.Op, y)
	}
	t.Fatalf("%T can't be evaluated here", e)
	return nil
}
