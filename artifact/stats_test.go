package artifact

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/artifact/object"
	"kedge/deployments"
)

// statsWorld is a node with release 1 live, and two more to come that share most files with it.
type statsWorld struct {
	releases *Releases
	pointers []deployments.Pointer
	log      strings.Builder
	live     *Release
}

const sharedFile = "same/in/all"

func newStatsWorld(t *testing.T) *statsWorld {
	t.Helper()
	w := &statsWorld{}
	store := t.TempDir()
	for _, version := range []string{"1", "2", "3"} {
		tree := t.TempDir()
		writeVersion(t, tree, version)
		if err := os.MkdirAll(filepath.Join(tree, "same/in"), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(tree, sharedFile), "as published")
		m := template(version)
		m.Immutable = true
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + store, Manifest: m})
		if err != nil {
			t.Fatal(err)
		}
		w.pointers = append(w.pointers, out.Pointer)
	}
	log := slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	w.releases = Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), log)
	w.next(t)
	return w
}

// next stages and switches to the next release, and removes all others.
func (w *statsWorld) next(t *testing.T) {
	t.Helper()
	w.live = stageOne(t, w.releases, w.pointers[0])
	w.pointers = w.pointers[1:]
	if err := w.releases.Switch(w.live); err != nil {
		t.Fatal(err)
	}
	if err := w.releases.Prune(0); err != nil {
		t.Fatal(err)
	}
}

// known says of each file of the live release with content whether it needs no hashing.
func (w *statsWorld) known(t *testing.T) map[string]bool {
	t.Helper()
	r, leave, err := w.releases.enter(false)
	if err != nil {
		t.Fatal(err)
	}
	defer leave()
	name := filepath.Base(w.live.Dir)
	rec, err := r.readRecord(name)
	if err != nil {
		t.Fatal(err)
	}
	data, err := r.readIndex(name, rec)
	if err != nil {
		t.Fatal(err)
	}
	x, err := decodeIndex(data)
	if err != nil {
		t.Fatal(err)
	}
	now, err := statTree(t.Context(), w.live.Dir, x)
	if err != nil {
		t.Fatal(err)
	}
	kept := r.readStats(name, rec.Index, len(x.entries))
	known := map[string]bool{}
	for i := range x.entries {
		if e := &x.entries[i]; e.kind == kindFile && e.size > 0 {
			known[e.path] = kept != nil && kept[i] != fileStat{} && kept[i] == now[i]
		}
	}
	return known
}

// tamper changes the shared file, and sets its time back, as its owner can.
func (w *statsWorld) tamper(t *testing.T) {
	t.Helper()
	path := filepath.Join(w.live.Dir, sharedFile)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, "As Published")
	if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
}

func (w *statsWorld) content(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(w.live.Dir, sharedFile))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Files that are as they were are linked without being read: through a deployment, and through the removal of the
// releases that they are shared with, both of which change their ctime.
func TestKnownFilesStayKnown(t *testing.T) {
	t.Parallel()
	w := newStatsWorld(t)
	first, err := os.Stat(filepath.Join(w.live.Dir, sharedFile))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for path, known := range w.known(t) {
			if !known {
				t.Errorf("release %s: %s would be read", w.live.Manifest.Version, path)
			}
		}
		w.next(t)
	}
	if last, err := os.Stat(filepath.Join(w.live.Dir, sharedFile)); err != nil || !os.SameFile(first, last) {
		t.Errorf("the file is not shared: %v", err)
	}
}

// A change of a known file is seen, also if its time was set back, and also if the next thing is that another
// release goes.
func TestChangedFilesAreNotKnown(t *testing.T) {
	t.Parallel()
	for name, then := range map[string]func(w *statsWorld){
		"at once": func(*statsWorld) {},
		"before others go": func(w *statsWorld) {
			w.live = stageOne(t, w.releases, w.pointers[0])
			w.live, _ = w.releases.Current()
			w.tamper(t)
		},
	} {
		w := newStatsWorld(t)
		if name == "at once" {
			w.tamper(t)
		}
		then(w)
		if err := w.releases.Prune(0); err != nil {
			t.Fatal(err)
		}
		if w.known(t)[sharedFile] {
			t.Errorf("%s: a file that was changed is taken as it is", name)
		}
		w.next(t)
		if got := w.content(t); got != "as published" {
			t.Errorf("%s: the next release has %q", name, got)
		}
	}
}

// What is known is not read: with verify: always it is. A check that reads all ends the trust in what it finds wrong.
func TestKnownFilesAreNotRead(t *testing.T) {
	t.Parallel()
	forge := func(w *statsWorld) { // what only root can do
		t.Helper()
		w.tamper(t)
		r, leave, err := w.releases.enter(false)
		if err != nil {
			t.Fatal(err)
		}
		defer leave()
		rec, err := r.readRecord(filepath.Base(w.live.Dir))
		if err != nil {
			t.Fatal(err)
		}
		data, err := r.readIndex(filepath.Base(w.live.Dir), rec)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := decodeIndex(data)
		stats, err := statTree(t.Context(), w.live.Dir, x)
		if err == nil {
			err = r.writeStats(filepath.Base(w.live.Dir), rec.Index, stats)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	w := newStatsWorld(t)
	forge(w)
	w.next(t)
	if got := w.content(t); got != "As Published" {
		t.Errorf("a known file was read: %q", got)
	}
	found, err := w.releases.Verify(t.Context(), w.live, 0)
	if err != nil || len(found) != 1 || found[0].Path != sharedFile {
		t.Errorf("a check that reads all finds %v, %v", found, err)
	}
	w.next(t)
	if got := w.content(t); got != "as published" {
		t.Errorf("after the check, the next release has %q", got)
	}
	w = newStatsWorld(t)
	forge(w)
	w.releases.hashAlways = true
	w.next(t)
	if got := w.content(t); got != "as published" {
		t.Errorf("with verify: always the next release has %q", got)
	}
	if !strings.Contains(w.log.String(), sharedFile) {
		t.Errorf("nothing is said of the file that was changed: %s", w.log.String())
	}
}
