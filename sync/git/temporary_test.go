package git

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A mirror that is killed leaves its temporary cache, and the next removes it: not that of one that
// runs, and nothing else.
func TestTemporaryDirsOfTheDead(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	dead, held, err := temporaryDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := held.Close(); err != nil { // as its death does
		t.Fatal(err)
	}
	alive, held, err := temporaryDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	foreign := filepath.Join(parent, temporaryPrefix+"foreign")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	hourAgo := time.Now().Add(-time.Hour)
	for _, dir := range []string{dead, alive, foreign} {
		if err := os.Chtimes(dir, hourAgo, hourAgo); err != nil {
			t.Fatal(err)
		}
	}
	_, held, err = temporaryDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for dir, stays := range map[string]bool{dead: false, alive: true, foreign: true} {
		if _, err := os.Stat(dir); stays != (err == nil) {
			t.Errorf("%s: %v, want it to stay: %v", dir, err, stays)
		}
	}
}
