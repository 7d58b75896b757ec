package fuzzlimit_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"kedge/deployments/fuzzlimit"
)

// failures counts failures in place of a test's.
type failures struct {
	testing.TB
	n int
}

func (f *failures) Errorf(string, ...any) { f.n++ }

// It isn't parallel: what others allocate meanwhile would count.
func TestRunBoundsMemory(t *testing.T) {
	f, kept := &failures{TB: t}, 0
	fuzzlimit.Run(f, "little", func() { kept += len(make([]byte, 1<<20)) })
	if f.n > 0 {
		t.Error("a mebibyte is too much")
	}
	fuzzlimit.Run(f, "much", func() {
		for range 64 {
			part := make([]byte, fuzzlimit.Memory/32)
			kept += len(part)
		}
	})
	if f.n != 1 {
		t.Errorf("%d failures of one that takes twice the bound, %d bytes", f.n, kept)
	}
}

// An input that stands still on a busy machine isn't slow; one that takes the processor is, and one that never ends.
func TestGuard(t *testing.T) {
	for name, c := range map[string]struct {
		busy, waiting, want time.Duration
		run                 func(late <-chan time.Duration)
	}{
		"waits": {100 * time.Millisecond, time.Hour, 0,
			func(<-chan time.Duration) { time.Sleep(150 * time.Millisecond) }},
		"never ends": {time.Hour, 10 * time.Millisecond, 10 * time.Millisecond, func(<-chan time.Duration) {}},
		"is busy": {50 * time.Millisecond, time.Hour, 50 * time.Millisecond, func(late <-chan time.Duration) {
			for len(late) == 0 {
				runtime.Gosched()
			}
		}},
	} {
		late := make(chan time.Duration, 1)
		stop := fuzzlimit.Guard(c.busy, c.waiting, func(most time.Duration) { late <- most })
		c.run(late)
		if c.want == 0 {
			stop()
			late <- 0
		}
		if got := <-late; got != c.want {
			t.Errorf("what %s is late after %v, want %v", name, got, c.want)
		}
		if c.want > 0 {
			stop()
		}
	}
}

// Each fuzz target bounds what an input may cost, by itself or by the function that it hands its f to.
func TestEachTargetIsBounded(t *testing.T) {
	t.Parallel()
	targets := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(f.Name.Name, "Fuzz") {
				continue
			}
			targets++
			bounded := false
			ast.Inspect(f.Body, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.SelectorExpr:
					of, ok := n.X.(*ast.Ident)
					bounded = bounded || ok && of.Name == "fuzzlimit"
				case *ast.Ident:
					bounded = bounded || n.Name == "fuzzWritten"
				}
				return true
			})
			if !bounded {
				t.Errorf("%s: %s doesn't call fuzzlimit.Run", path, f.Name.Name)
			}
		}
		return nil
	})
	if err != nil || targets < 29 {
		t.Errorf("%d targets, %v", targets, err)
	}
}
