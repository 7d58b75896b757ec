package deploy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// mounted bind-mounts a directory of the same device at path, as an operator does for uploads, and returns what checks
// that its file is still there.
func (w *world) mounted(path string) (intact func()) {
	w.t.Helper()
	tooltest.NeedRoot(w.t)
	data := w.t.TempDir()
	precious := filepath.Join(data, "precious")
	err := os.WriteFile(precious, []byte("data"), 0o600)
	if err == nil {
		err = os.MkdirAll(path, 0o755)
	}
	if err == nil {
		err = syscall.Mount(data, path, "", syscall.MS_BIND, "")
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(w.unmountAll)
	return func() {
		w.t.Helper()
		if data, err := os.ReadFile(precious); err != nil || string(data) != "data" {
			w.t.Errorf("what was mounted: %q, %v", data, err)
		}
	}
}

// unmountAll unmounts what lies below the world's directory, wherever it was moved to.
func (w *world) unmountAll() {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		w.t.Fatal(err)
	}
	escapes := strings.NewReplacer(`\040`, " ", `\134`, `\`)
	for line := range strings.Lines(string(table)) {
		if at := escapes.Replace(strings.Fields(line)[4]); strings.HasPrefix(at, w.root+"/") {
			if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil {
				w.t.Error(err)
			}
		}
	}
}

// copies lists the files of a mount's name below the state directory.
func (w *world) copies() (found []string) {
	w.t.Helper()
	err := filepath.WalkDir(w.path("state"), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Name() == "precious" {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return found
}

// A first release that fails over a tree with a mount in it leaves the mount alone, and takes no copy of what is in it.
func TestFirstReleaseLeavesMountsAlone(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRsync, deployments.StrategyMv} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.foreign((*world).tree)
			intact := w.mounted(filepath.Join(w.dest(), "dir", `up lo\ads`))
			bad := w.publish("1", func(m *deployments.Manifest) {
				m.Strategy = strategy
				if strategy == deployments.StrategyMv {
					m.Commands.Pre = []deployments.Command{{Run: fmt.Sprintf("mv %s %[1]s.old", w.dest())}}
				}
				fails(m)
			})
			u := w.open(nil)
			u.at = func(point string) {
				if found := w.copies(); len(found) > 0 {
					t.Errorf("%s: there is a copy of what is mounted: %q", point, found)
				}
			}
			w.wantFailed(u, bad, deployments.Pointer{})
			w.wantForeign()
			w.wantRestored(u, bad)
			intact()
			if _, err := os.Stat(filepath.Join(w.dest(), "dir", `up lo\ads`, "precious")); err != nil {
				t.Errorf("the mount is not at its place: %v", err)
			}
		})
	}
}

// A release's command may mount something in its tree before it fails: the way back leaves that alone, and isn't held
// up by it.
func TestWayBackLeavesMountsAlone(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{
		deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv,
	} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			in := func(m *deployments.Manifest) {
				m.Strategy, m.Keep = strategy, 0
				if strategy == deployments.StrategyMv {
					const aside = "rm -rf %s.old; [ ! -e %[1]s ] || mv %[1]s %[1]s.old"
					m.Commands.Pre = []deployments.Command{{Run: fmt.Sprintf(aside, w.dest())}}
				}
			}
			u := w.open(nil)
			good := w.publish("1", in)
			w.deploy(u, good)
			intact := w.mounted(w.path("data")) // mounted a second time by the command
			bad := w.publish("2", func(m *deployments.Manifest) {
				in(m)
				m.Commands.Post = []deployments.Command{{
					Run: fmt.Sprintf("mkdir %s/cache && mount --bind %s %[1]s/cache; false", w.dest(), w.path("data")),
				}}
			})
			w.wantFailed(u, bad, good)
			w.wantVersion("1")
			intact()
			if s := u.State(); s.Unfinished || s.Drained {
				t.Errorf("the way back is held up: %+v", s)
			}
			w.unmountAll()
			w.deploy(u, w.publish("3", in))
			w.wantVersion("3")
			intact()
		})
	}
}

// What a kill left of a tree that was being unpacked may have something mounted in it by now: staging says so, and
// empties nothing.
func TestStagingLeavesMountsAlone(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRsync, deployments.StrategyMv} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			one := w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy })
			intact := w.mounted(filepath.Join(u.treesDir(), one.Digest.String()+".part", "dir"))
			if err := u.Stage(t.Context(), one); err == nil || !strings.Contains(err.Error(), "mount point") {
				t.Errorf("got %v", err)
			}
			intact()
			w.unmountAll()
			w.deploy(u, one)
			w.wantVersion("1")
			intact()
		})
	}
}
