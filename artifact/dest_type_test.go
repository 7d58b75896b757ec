package artifact

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/treetest"
	"kedge/deployments"
)

// noDirectories make something at a path that is no directory.
var noDirectories = map[string]func(path string) error{
	"file": func(path string) error { return os.WriteFile(path, []byte("precious"), 0o600) },
	"link to a file": func(path string) error {
		return errors.Join(os.WriteFile(path+".target", nil, 0o600), os.Symlink(path+".target", path))
	},
	"fifo": func(path string) error { return unix.Mkfifo(path, 0o600) },
	"socket": func(path string) error {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		return l.Close()
	},
}

// Strategy rsync reports what lies at dest and is no directory as drift. It never replaces that, as
// nobody knows who put it there, and heals once it is gone.
func TestRsyncOverWhatIsNoDirectory(t *testing.T) {
	t.Parallel()
	for kind, create := range noDirectories {
		for _, recorded := range []bool{false, true} {
			w := deployWithCommands(t, deployments.StrategyRsync, treetest.Tree{"a": {Mode: 0o644, Data: "1"}},
				func(in func(string) string) error {
					if recorded {
						return os.WriteFile(in("made"), []byte("by commands"), 0o644)
					}
					return nil
				})
			if !w.IsLive(w.rel) {
				t.Errorf("%s: the release is not live", kind)
			}
			if err := errors.Join(os.RemoveAll(w.dest), create(w.dest)); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(w.dest)
			if err != nil {
				t.Fatal(err)
			}
			want := []Difference{{".", "type"}}
			w.wantDrift(want...)
			if found, err := w.Compare(t.Context(), w.rel, 0); err != nil || !slices.Equal(found, want) {
				t.Errorf("%s: compared: %v, %v", kind, found, err)
			}
			if w.IsLive(w.rel) {
				t.Errorf("%s: the release is live", kind)
			}
			_, healed := w.Heal(t.Context(), w.rel)
			for what, err := range map[string]error{
				"switch": w.Switch(t.Context(), w.rel),
				"heal":   healed,
				"back":   w.SwitchBack(t.Context(), w.rel, w.rel, false),
			} {
				if !errors.Is(err, ErrUntouched) || !strings.Contains(err.Error(), w.dest+" is neither a directory") {
					t.Errorf("%s: %s: %v", kind, what, err)
				}
			}
			if after, err := os.Lstat(w.dest); err != nil || !os.SameFile(before, after) {
				t.Errorf("%s: it was replaced: %v", kind, err)
			}
			if err := os.Remove(w.dest); err != nil {
				t.Fatal(err)
			}
			w.wantDrift(Difference{".", "missing"})
			if _, err := w.Heal(t.Context(), w.rel); err != nil {
				t.Fatal(err)
			}
			w.wantFile("a", 0o644, "1")
		}
	}
}

// A link at dest that leads nowhere is a missing tree, which strategy rsync makes where the link
// leads.
func TestRsyncOverADanglingLink(t *testing.T) {
	t.Parallel()
	home := treetest.OpenHome(t)
	w := deployWithCommands(t, deployments.StrategyRsync, treetest.Tree{"a": {Mode: 0o644, Data: "1"}},
		func(func(string) string) error { return nil })
	if err := os.RemoveAll(w.dest); err != nil {
		t.Fatal(err)
	}
	treetest.Relink(t, w.dest, filepath.Join(home, "elsewhere"))
	want := []Difference{{".", "missing"}}
	w.wantDrift(want...)
	if found, err := w.Compare(t.Context(), w.rel, 0); err != nil || !slices.Equal(found, want) {
		t.Errorf("compared: %v, %v", found, err)
	}
	if w.IsLive(w.rel) {
		t.Error("the release is live")
	}
	w.wantHealed()
	if info, err := os.Lstat(w.dest); err != nil || info.Mode().Type() != fs.ModeSymlink || !w.IsLive(w.rel) {
		t.Errorf("the link is gone, or the release not live: %v, %v", info, err)
	}
}

// What lies at dest is no release of strategy mv either if it is no directory.
func TestMvIsNotLiveWithoutADirectory(t *testing.T) {
	t.Parallel()
	for kind, create := range noDirectories {
		rel := &Release{Manifest: &deployments.Manifest{Src: "file:///x.tar", Dest: filepath.Join(t.TempDir(), "app"),
			Strategy: deployments.StrategyMv}}
		if err := create(rel.Manifest.Dest); err != nil {
			t.Fatal(err)
		}
		if NewSwitcher(rel.Manifest, SwitcherConfig{}).IsLive(rel) {
			t.Errorf("%s: the release is live", kind)
		}
	}
}
