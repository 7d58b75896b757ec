// Package tooltest finds what tests need of the machine: root, and the real programs that .ci/tools builds.
package tooltest

import (
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
)

// Path returns the path of a program that .ci/tools builds. With -short it skips the test. Without -short it fails the
// test if the program is missing.
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

// NeedRoot fails a test that needs root, to mount something or to act as several users, but doesn't run as root. With
// -short it skips such a test instead.
func NeedRoot(tb testing.TB) {
	tb.Helper()
	switch {
	case os.Geteuid() == 0:
	case testing.Short():
		tb.Skip("needs root: left out with -short")
	default:
		tb.Fatal("the test needs root: run the tests as root, as CI does")
	}
}

// Main runs a package's tests for its TestMain, and returns the exit code. With -short it runs eight of them at a time
// unless -parallel is given: without servers and browsers beside them, they mostly wait.
func Main(m *testing.M) int {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if testing.Short() && !given {
		flag.Set("test.parallel", strconv.Itoa(max(8, runtime.GOMAXPROCS(0))))
	}
	return m.Run()
}
