package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
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

// Headers alone can fill a frame: each hard link's holds the whole path of its file.
func TestPackBoundsFramesOfHeaders(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	long := filepath.Join(top, strings.Repeat(strings.Repeat("a", 250)+"/", 12), "file")
	if err := os.MkdirAll(filepath.Dir(long), 0o755); err != nil {
		t.Fatal(err)
	}
	treetest.WriteFile(t, long, "data")
	for i := range 2000 {
		if err := os.Link(long, filepath.Join(top, fmt.Sprintf("b%04d", i))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Pack(t.Context(), top, deployments.SymlinksInside, CompressionDefault, io.Discard, nil); err != nil {
		t.Error(err)
	}
}

func TestHeaderSizeIsNeverTooLow(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 100)
	x := &Index{Entries: []Entry{{Path: strings.Repeat(long+"/", 30) + "file"}}}
	for _, name := range []string{"short", "gr\u00fc\u00df", long, long + "/" + long} {
		x.Entries = append(x.Entries, Entry{Path: name}, Entry{Path: name, Kind: Dir},
			Entry{Path: name, Kind: Hardlink}, Entry{Path: name, Kind: Hardlink, Original: 1},
			Entry{Path: name, Kind: Symlink, Target: "gr\u00fcn"}, Entry{Path: name, Kind: Symlink, Target: long + long})
	}
	for i := range x.Entries {
		w := packWorker{packer: &packer{index: x}}
		if err := w.header(i); err != nil {
			t.Fatal(err)
		}
		if e := &x.Entries[i]; x.headerSize(e) < int64(w.raw.Len()) {
			t.Errorf("%+v: estimated %d bytes, has %d", e, x.headerSize(e), w.raw.Len())
		}
	}
}

// A name that fits the plain header is not counted as one that doesn't: the cuts between frames would move, and with
// them the bytes of every such tree.
func TestHeaderSizeOfNamesThatFit(t *testing.T) {
	t.Parallel()
	x := &Index{}
	for _, c := range []struct {
		entry Entry
		want  bool
	}{
		{Entry{Path: strings.Repeat("x", 100)}, true},
		{Entry{Path: strings.Repeat("x", 101)}, false},
		{Entry{Path: strings.Repeat("x", 99), Kind: Dir}, true},
		{Entry{Path: strings.Repeat("x", 100), Kind: Dir}, false},
		{Entry{Path: "link", Kind: Symlink, Target: strings.Repeat("x", 100)}, true},
		{Entry{Path: "link", Kind: Symlink, Target: strings.Repeat("x", 101)}, false},
	} {
		if fits := x.headerSize(&c.entry) == 512; fits != c.want {
			t.Errorf("%v of %d and %d bytes: %v", c.entry.Kind, len(c.entry.Path), len(c.entry.Target), fits)
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
