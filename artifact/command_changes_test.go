package artifact

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// withCommands is a live release whose commands have run.
type withCommands struct {
	Switcher
	t    *testing.T
	rel  *Release
	dest string
}

// deployWithCommands makes a release of tree live; commands does what the release's commands do.
func deployWithCommands(
	t *testing.T,
	strategy deployments.Strategy,
	tree treetest.Tree,
	commands func(in func(p string) string) error,
) *withCommands {
	t.Helper()
	if _, err := exec.LookPath("rsync"); err != nil && strategy == deployments.StrategyRsync && testing.Short() {
		t.Skip("takes rsync: left out with -short")
	}
	home, dir := t.TempDir(), t.TempDir()
	tree.Write(t, dir)
	objects := object.New(object.Config{})
	out, err := Publish(t.Context(), objects,
		PublishOptions{Dir: dir, To: "file://" + t.TempDir(), Manifest: template("1")})
	if err != nil {
		t.Fatal(err)
	}
	m, raw, err := fetchManifest(t.Context(), objects, out.Pointer, nil)
	if err != nil {
		t.Fatal(err)
	}
	m.Dest, m.Strategy = filepath.Join(home, "app"), strategy
	w := &withCommands{t: t, rel: &Release{Pointer: out.Pointer, Manifest: m, Raw: raw}, dest: m.Dest}
	w.Switcher = NewSwitcher(m, SwitcherConfig{Objects: objects, Trees: filepath.Join(home, "trees"),
		Changes: filepath.Join(home, "changes"), Tool: runTool})
	for _, step := range []func() error{
		func() error { return w.Stage(t.Context(), w.rel, StageOptions{}) },
		func() error { return w.RecordBefore(t.Context(), w.rel) },
		func() error { return w.Switch(t.Context(), w.rel) },
		func() error { return commands(w.in) },
		func() error { return w.RecordAfter(t.Context(), w.rel) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *withCommands) in(p string) string { return filepath.Join(w.dest, p) }

func (w *withCommands) wantDrift(want ...Difference) {
	w.t.Helper()
	found, err := w.Verify(w.t.Context(), w.rel, 0)
	slices.SortFunc(found, func(a, b Difference) int { return archive.ComparePaths(a.Path, b.Path) })
	if err != nil || !slices.Equal(found, want) {
		w.t.Errorf("drift: %v, %v; want %v", found, err, want)
	}
}

func (w *withCommands) wantHealed(left ...Difference) {
	w.t.Helper()
	if found, err := w.Heal(w.t.Context(), w.rel); err != nil || !slices.Equal(found, left) {
		w.t.Errorf("healing left %v, %v; want %v", found, err, left)
	}
	w.wantDrift(left...)
}

// wantFile fails the test unless a file has the mode and content.
func (w *withCommands) wantFile(p string, mode fs.FileMode, content string) {
	w.t.Helper()
	info, err := os.Stat(w.in(p))
	if err != nil {
		w.t.Error(err)
		return
	}
	if data, err := os.ReadFile(w.in(p)); err != nil || string(data) != content || info.Mode() != mode {
		w.t.Errorf("%s has %s, %q, %v; want %s, %q", p, info.Mode(), data, err, mode, content)
	}
}

// A file that a command only touched, or wrote as it was, belongs to the archive.
func TestTouchedFilesAreTheArchives(t *testing.T) {
	t.Parallel()
	file := treetest.File{Mode: 0o644, Data: "content"}
	w := deployWithCommands(t, deployments.StrategyRsync,
		treetest.Tree{"touched": file, "rewritten": file, "private": file, "changed": file},
		func(in func(p string) string) error {
			return errors.Join(os.Chtimes(in("touched"), time.Time{}, time.Now()),
				os.WriteFile(in("rewritten"), []byte("content"), 0o644),
				os.WriteFile(in("private"), []byte("content"), 0o644), os.Chmod(in("private"), 0o600),
				os.WriteFile(in("changed"), []byte("CONTENT"), 0o644))
		})
	var recorded []string
	for _, m := range readChanges(w.Switcher.(rsyncSwitcher).changeRecord(w.rel).made) {
		recorded = append(recorded, m.Path+" "+m.What)
	}
	if got := strings.Join(recorded, ", "); got != "changed content, private mode" {
		t.Errorf("recorded as the commands': %s", got)
	}
	w.wantDrift()
	want := []Difference{{"rewritten", "mode"}, {"touched", "content"}}
	tamper := func() error { return os.Chmod(w.in("rewritten"), 0o777) }
	if os.Getuid() == 0 {
		want[0].What, tamper = "owner", func() error { return os.Chown(w.in("rewritten"), 1, 1) }
	}
	if err := errors.Join(tamper(), os.WriteFile(w.in("touched"), []byte("tampered"), 0o644)); err != nil {
		t.Fatal(err)
	}
	w.wantDrift(want...)
	w.wantHealed()
	w.wantFile("rewritten", 0o644, "content")
	w.wantFile("touched", 0o644, "content")
	w.wantFile("private", 0o600, "content")
	w.wantFile("changed", 0o644, "CONTENT")
}

// What rsync would remove is listed as far as that is bounded: a directory without what lies in it, and not more than
// maxExtra paths.
func TestExtraPathsAreBounded(t *testing.T) {
	t.Parallel()
	many := func(prefix string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "*deleting   /%s%d\n", prefix, i)
		}
		return b.String()
	}
	for name, test := range map[string]struct {
		output string
		paths  int
		last   string
		more   int
	}{
		"a directory":          {many("new/sub/f", 3) + "*deleting   /new/sub/\n*deleting   /new/\n", 1, "new", 0},
		"a similar name":       {many("new.d/f", 3) + "*deleting   /new/\n", 4, "new", 0},
		"a file of the name":   {many("new/f", 3) + "*deleting   /new\n", 4, "new", 0},
		"other lines between":  {many("new/f", 3) + ">fc.t...... /a\n*deleting   /new/\n", 1, "new", 0},
		"as many as fit":       {many("f", maxExtra), maxExtra, fmt.Sprint("f", maxExtra-1), 0},
		"more than fit":        {many("f", maxExtra+3), maxExtra, fmt.Sprint("f", maxExtra-1), 3},
		"a large directory":    {many("new/f", maxExtra+3) + "*deleting   /new/\n", 1, "new", 0},
		"many and a directory": {many("f", 3) + many("new/f", maxExtra) + "*deleting   /new/\n", 4, "new", 0},
		"one that is skipped":  {many("theirs/f", 3) + many("f", 1) + "*deleting   /theirs/\n", 1, "f0", 0},
	} {
		items := itemized{skip: pathSet{"theirs": true}}
		if _, err := io.WriteString(&items, test.output); err != nil {
			t.Fatal(err)
		}
		if n := len(items.extra); n != test.paths || items.extra[n-1].Path != test.last || items.more != test.more {
			t.Errorf("%s: %d paths, %d more; want %d, of which %q is the last, and %d more", name, n, items.more, test.paths,
				test.last, test.more)
		}
	}
}

// Of the paths that an archive lacks, and of those with a wrong owner, at most maxExtra are listed. What the release's
// commands made doesn't count.
func TestListsOfAVerificationAreBounded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tree := treetest.Tree{"theirs": {Mode: fs.ModeDir | 0o755}}
	for i := range 3 {
		tree[fmt.Sprint("f", i)] = treetest.File{Mode: 0o644}
		tree[fmt.Sprint("theirs/f", i)] = treetest.File{Mode: 0o644}
	}
	tree.Write(t, dir)
	v := newVerifier(&archive.Index{}, 0, nil)
	v.made = pathSet{"theirs": true}
	v.extra = maxExtra - 1
	if err := v.verify(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if want := []Difference{{"f0", "extra"}}; !slices.Equal(v.found, want) || v.more != 2 {
		t.Errorf("listed %v, and %d more; want %v, and 2", v.found, v.more, want)
	}
	other := strconv.Itoa(os.Getuid() + 1)
	found, err := verifyOwner(t.Context(), dir, other, nil, v.made)
	theirs := func(d Difference) bool { return v.made.covers(d.Path) }
	if err != nil || len(found) != 4 || slices.ContainsFunc(found, theirs) {
		t.Errorf("paths with a wrong owner: %v, %v; want the top and three files", found, err)
	}
}

// What lies below a directory that is extra is no difference of its own, whatever rsync prints in between.
func TestExtraDirectoryIsOneDifference(t *testing.T) {
	t.Parallel()
	w := deployWithCommands(t, deployments.StrategyRsync,
		treetest.Tree{"a": {Mode: 0o644, Data: "1"}, "dir": {Mode: fs.ModeDir | 0o755}, "dir/b": {Mode: 0o644, Data: "1"}},
		func(in func(p string) string) error { return os.MkdirAll(in("dir/theirs/sub"), 0o755) })
	for _, dir := range []string{"dir/new/sub", "dir/new.d", "dir/theirs/sub", "new"} {
		if err := os.MkdirAll(w.in(dir), 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			treetest.WriteFile(t, filepath.Join(w.in(dir), fmt.Sprint(i)), "")
		}
	}
	treetest.WriteFile(t, w.in("dir/b"), "2")
	w.wantDrift(Difference{"dir/b", "content"}, Difference{"dir/new", "extra"}, Difference{"dir/new.d", "extra"},
		Difference{"new", "extra"})
	w.wantHealed()
	if left := len(treetest.List(t, w.in("dir/theirs/sub"))); left != 100 {
		t.Errorf("healing left %d of the files in a directory of the commands'", left)
	}
}

// A link that commands have turned leads where they turned it all the time, whatever else is healed, and is put right
// in one step.
func TestTurnedLinksStayWhileHealed(t *testing.T) {
	t.Parallel()
	w := deployWithCommands(t, deployments.StrategyRsync,
		treetest.Tree{"a": {Mode: 0o644, Data: "1"}, "b": {Mode: 0o644, Data: "1"},
			"conf": {Mode: fs.ModeSymlink, Target: "a"}, "was-file": {Mode: 0o644}},
		func(in func(p string) string) error {
			return errors.Join(os.Remove(in("conf")), os.Symlink("b", in("conf")), os.Remove(in("was-file")),
				os.Symlink("b", in("was-file")), os.Symlink("b", in("made")))
		})
	events, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(events)
	const changes = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM
	if _, err := unix.InotifyAddWatch(events, w.dest, changes); err != nil {
		t.Fatal(err)
	}
	// seen returns what has happened to a name since it was called last, but for hidden ones.
	seen := func() (what string) {
		buffer := make([]byte, 64<<10)
		n, err := unix.Read(events, buffer)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		for at := 0; at < n; {
			size := int(binary.NativeEndian.Uint32(buffer[at+12:]))
			name := strings.TrimRight(string(buffer[at+unix.SizeofInotifyEvent:at+unix.SizeofInotifyEvent+size]), "\x00")
			if !strings.HasPrefix(name, ".") {
				what += fmt.Sprintf("%s %#x, ", name, binary.NativeEndian.Uint32(buffer[at+4:]))
			}
			at += unix.SizeofInotifyEvent + size
		}
		return strings.TrimSuffix(what, ", ")
	}
	treetest.WriteFile(t, w.in("a"), "tampered")
	w.wantHealed()
	if got := seen(); got != "a 0x80" { // IN_MOVED_TO
		t.Errorf("healing a file did this: %s", got)
	}
	for _, link := range []string{"conf", "made", "was-file"} {
		treetest.Relink(t, w.in(link), "elsewhere")
	}
	seen()
	w.wantHealed()
	if got := seen(); got != "conf 0x80, made 0x80, was-file 0x80" {
		t.Errorf("healing links did this: %s", got)
	}
	for _, link := range []string{"conf", "made", "was-file"} {
		if target, err := os.Readlink(w.in(link)); err != nil || target != "b" {
			t.Errorf("%s leads to %q, %v", link, target, err)
		}
	}
	// A directory in its place goes.
	if err := errors.Join(os.Remove(w.in("conf")), os.MkdirAll(w.in("conf/dir"), 0o755)); err != nil {
		t.Fatal(err)
	}
	w.wantHealed()
	if left := treetest.List(t, w.dest); !slices.Equal(left, []string{"a", "b", "conf", "made", "was-file"}) {
		t.Errorf("left: %q", left)
	}
}

// The mode of a file that commands made or changed is healed if its content is as they left it. The file stays the same
// one, as its application may have it open.
func TestModesOfCommandsFilesAreHealed(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := deployWithCommands(t, strategy, treetest.Tree{"changed": {Mode: 0o644, Data: "1"}},
				func(in func(p string) string) error {
					return errors.Join(os.WriteFile(in("changed"), []byte("theirs"), 0), os.Chmod(in("changed"), 0o600),
						os.WriteFile(in("made"), []byte("theirs"), 0o640), os.WriteFile(in("app.pid"), nil, 0o600),
						os.WriteFile(in("app.log"), []byte("one\n"), 0o640))
				})
			w.wantDrift()
			if err := os.WriteFile(w.in("app.log"), []byte("one\ntwo\n"), 0); err != nil {
				t.Fatal(err)
			}
			w.wantDrift()
			for _, p := range []string{"changed", "made", "app.pid", "app.log"} {
				if err := os.Chmod(w.in(p), 0o777); err != nil {
					t.Fatal(err)
				}
			}
			before, err := os.Stat(w.in("made"))
			if err != nil {
				t.Fatal(err)
			}
			w.wantDrift(Difference{"app.log", "mode"}, Difference{"changed", "mode"}, Difference{"made", "mode"})
			w.wantHealed(Difference{"app.log", "mode"})
			w.wantFile("app.log", 0o777, "one\ntwo\n") // its application may have replaced it
			w.wantFile("changed", 0o600, "theirs")
			w.wantFile("made", 0o640, "theirs")
			w.wantFile("app.pid", 0o777, "") // it comes and goes
			if after, err := os.Stat(w.in("made")); err != nil || !os.SameFile(before, after) {
				t.Errorf("it is another file: %v", err)
			}
		})
	}
}
