package archive

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// The same tree gives the same bytes, whatever the number of cores and the times of the files.
func TestPackIsDeterministic(t *testing.T) {
	first := make([][]byte, len(compressions))
	for _, cores := range []int{1, 7} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
		dir := t.TempDir()
		treetest.Sample(1).Write(t, dir)
		for c := range first {
			var out bytes.Buffer
			if _, err := Pack(t.Context(), dir, deployments.SymlinksInside, Compression(c), &out, nil); err != nil {
				t.Fatal(err)
			}
			if first[c] == nil {
				first[c] = out.Bytes()
			} else if !bytes.Equal(first[c], out.Bytes()) {
				t.Errorf("with %d cores the archive (%s) has other bytes than with one", cores, Compression(c))
			}
		}
	}
}

// A large file is read in parts: half of one program and half of the next are never published, though both have one
// size.
func TestPackRefusesAFileThatIsRewritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "server")
	if err := os.WriteFile(path, treetest.Random(1, 64<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	done := false
	change := writerFunc(func(data []byte) (int, error) {
		if !done {
			done = true
			if err := os.WriteFile(path, treetest.Random(2, 64<<20), 0o644); err != nil {
				t.Error(err)
			}
		}
		return len(data), nil
	})
	_, err := Pack(t.Context(), dir, deployments.SymlinksInside, CompressionDefault, change, nil)
	if !errors.Is(err, safefs.ErrChanging) {
		t.Errorf("%v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(data []byte) (int, error) { return f(data) }
