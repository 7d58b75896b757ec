package artifact

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
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
		treetest.WriteFile(t, filepath.Join(tree, sharedFile), "as published")
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
	x, err := archive.DecodeIndex(data)
	if err != nil {
		t.Fatal(err)
	}
	now, err := statTree(t.Context(), w.live.Dir, x)
	if err != nil {
		t.Fatal(err)
	}
	kept := r.readStats(name, rec.Index)
	known := map[string]bool{}
	for i := range x.Entries {
		if e := &x.Entries[i]; e.Kind == archive.File && e.Size > 0 {
			known[e.Path] = kept != nil && kept[i] != fileStat{} && kept[i] == now[i]
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
	treetest.WriteFile(t, path, "As Published")
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

// A file of the archive that a command changed makes no other file unknown.
func TestFilesStayKnownBesideACommandsChange(t *testing.T) {
	t.Parallel()
	w := newStatsWorld(t)
	if err := w.releases.RecordBefore(t.Context(), w.live); err != nil {
		t.Fatal(err)
	}
	treetest.WriteFile(t, filepath.Join(w.live.Dir, "VERSION"), "a command's")
	if err := w.releases.RecordAfter(t.Context(), w.live); err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); ; { // a file that was written just now is hashed, but isn't recorded
		if found, err := w.releases.Verify(t.Context(), w.live, 0); err != nil || len(found) > 0 {
			t.Fatalf("%v, %v", found, err)
		}
		if known := w.known(t); known[sharedFile] && !known["VERSION"] {
			return
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("known: %v", w.known(t))
		}
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
		x, _ := archive.DecodeIndex(data)
		stats, err := statTree(t.Context(), w.live.Dir, x)
		if err == nil {
			err = r.writeFileStats(filepath.Base(w.live.Dir), rec.Index, stats)
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

// A known file is linked by its name. If another file has that name by then, or the file was written to, nothing is
// linked.
func TestLinkByNameTakesNothingElse(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(file string) error
		linked bool
	}{
		"as it was": {func(string) error { return nil }, true},
		"another file": {func(file string) error {
			info, err := os.Stat(file)
			if err == nil {
				err = os.WriteFile(file+"-", []byte("another"), 0o644)
			}
			if err == nil {
				err = os.Chtimes(file+"-", info.ModTime(), info.ModTime())
			}
			return errors.Join(err, os.Rename(file+"-", file))
		}, false},
		"a symbolic link": {func(file string) error {
			return errors.Join(os.Rename(file, file+"-"), os.Symlink("file-", file))
		}, false},
		"a write": {func(file string) error { return os.WriteFile(file, []byte("written"), 0o644) }, false},
		"a mode":  {func(file string) error { return os.Chmod(file, 0o755|os.ModeSetuid) }, false},
		"nothing": {os.Remove, false},
	} {
		old, dir := t.TempDir(), t.TempDir()
		file := filepath.Join(old, "file")
		treetest.WriteFile(t, file, "content")
		past := time.Now().Add(-time.Hour) // so that a write is seen however coarse the clock is
		if err := errors.Join(os.Chmod(file, 0o644), os.Chtimes(file, past, past)); err != nil {
			t.Fatal(err)
		}
		from, err := safefs.OpenDir(old)
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		to, err := safefs.OpenDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer to.Close()
		var before unix.Stat_t
		if err := unix.Fstatat(int(from.Fd()), "file", &before, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
		if err := c.change(file); err != nil {
			t.Fatal(err)
		}
		w := &treeWorker{dirs: safefs.Dirs{Top: to}}
		e := &archive.Entry{Path: "new", Kind: archive.File, Mode: 0o644, Size: before.Size}
		after, err := w.linkNamed(e, int(from.Fd()), "file", &before, newSharing(&deployments.Manifest{Immutable: true}))
		if err != nil || (after != nil) != c.linked {
			t.Errorf("%s: linked %v, %v, want %v", name, after != nil, err, c.linked)
		}
		if _, err := os.Lstat(filepath.Join(dir, "new")); (err == nil) != c.linked {
			t.Errorf("%s: what was linked: %v", name, err)
		}
	}
}

// Files of equal content are each linked to the file at the same path, so that they stay as many as they are. What
// has moved is linked to any that has its content.
func TestFilesAreLinkedPathByPath(t *testing.T) {
	t.Parallel()
	dir := treetest.File{Mode: fs.ModeDir | 0o755}
	old := treetest.Tree{
		"a": dir, "a/same": {Mode: 0o644, Data: "equal"}, "b": dir, "b/same": {Mode: 0o644, Data: "equal"},
		"c": dir, "c/moves": {Mode: 0o644, Data: "moved"},
	}
	next := treetest.Tree{
		"a": dir, "a/same": {Mode: 0o644, Data: "equal"}, "b": dir, "b/same": {Mode: 0o644, Data: "equal"},
		"d": dir, "d/moved": {Mode: 0o644, Data: "moved"}, "d/new": {Mode: 0o644, Data: "new"},
	}
	one, two, got := t.TempDir(), t.TempDir(), t.TempDir()
	old.Write(t, one)
	next.Write(t, two)
	from, to := publishTree(t, one), publishTree(t, two)
	to.manifest.Immutable = true
	mustFetch(t, to.manifest, from.asBase(one), got)
	treetest.Same(t, got, two)
	for new, old := range map[string]string{"a/same": "a/same", "b/same": "b/same", "d/moved": "c/moves"} {
		was, err := os.Stat(filepath.Join(one, old))
		if err != nil {
			t.Fatal(err)
		}
		if is, err := os.Stat(filepath.Join(got, new)); err != nil || !os.SameFile(was, is) {
			t.Errorf("%s isn't linked to %s: %v", new, old, err)
		}
	}
}
