// Package tooltest finds the real programs that tests run: servers and tools that .ci/tools builds.
package tooltest

import (
	"os"
	"path/filepath"
	"testing"
)

// Path returns the path of a program that .ci/tools builds. It skips the test with -short, and else fails it if the
// program is missing.
func Path(tb testing.TB, name string) string {
	tb.Helper()
	if testing.Short() {
		tb.Skipf("needs a real %s: left out with -short", name)
	}
	dir := os.Getenv("KEDGE_TOOLS")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			tb.Fatalf("looking for %s: %v; set KEDGE_TOOLS to the directory that .ci/tools built into", name, err)
		}
		dir = filepath.Join(cache, "kedge-tools")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		tb.Fatalf("the tests need a real %s: %v; run .ci/tools, or set KEDGE_TOOLS", name, err)
	}
	return path
}
