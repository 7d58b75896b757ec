package deploy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/treetest"
	"kedge/deployments"
)

// mountSrv mounts a tmpfs of its own for dest.
func (w *world) mountSrv(options string) {
	w.t.Helper()
	treetest.MountTmpfs(w.t, w.path("srv"), options)
}

// Releases that fail, one after the other, don't fill the disk: the room for the next comes from them.
func TestFailedReleasesMakeRoom(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.mountSrv("size=400k") // three releases
	u := w.open(nil)
	publish := func(version string, change func(*deployments.Manifest)) deployments.Pointer {
		return w.publish(version, func(m *deployments.Manifest) {
			m.Src, m.Checksum = w.archive(version+".tar",
				entry{name: "a", data: version, mode: 0o644}, entry{name: "dir/b", data: version, mode: 0o644},
				entry{name: "z", data: version, mode: 0o644}, entry{name: "ballast", data: strings.Repeat("x", 100<<10), mode: 0o644})
			m.Keep = 2
			if change != nil {
				change(m)
			}
		})
	}
	good := publish("good", nil)
	w.deploy(u, good)
	for i := range 10 {
		w.wantFailed(u, publish(fmt.Sprint("bad", i), fails), good)
		if i == 1 { // the newest failed one stays for whoever looks
			names, err := filepath.Glob(filepath.Join(w.dest()+".releases", "*-*"))
			if err != nil || len(names) != 2 || !strings.Contains(strings.Join(names, " "), "bad1-") {
				t.Errorf("after two failures: %q, %v", names, err)
			}
		}
	}
	w.deploy(u, publish("fix", nil))
	w.wantVersion("fix")
}

// A dest that becomes read-only between drain and switch doesn't hold the node out of service: what ran was never
// touched.
func TestReadOnlyDestIsPutBackIntoService(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.mountSrv("")
			set := func(m *deployments.Manifest) {
				m.Strategy = strategy
				m.Commands.Pre = nil
			}
			u := w.open(nil)
			one := w.publish("1", set)
			w.deploy(u, one)
			two := w.publish("2", set)
			remount := func(flags uintptr) {
				if err := unix.Mount("", w.path("srv"), "", unix.MS_REMOUNT|flags, ""); err != nil {
					t.Fatal(err)
				}
			}
			u.at = func(point string) {
				if point == "before switch" {
					remount(unix.MS_RDONLY)
				}
			}
			err := u.Deploy(t.Context(), Request{Release: two})
			if strategy == deployments.StrategyMv && errors.As(err, new(*Failed)) {
				err = errors.New("mv needs a dest that is gone, which counts as the release's fault")
			}
			if err == nil || errors.As(err, new(*Failed)) {
				t.Fatalf("got %v", err)
			}
			if s := u.State(); s.Running != one || s.Drained || s.Unfinished {
				t.Errorf("state: %+v after %v", s, err)
			}
			w.wantVersion("1")
			u.at = func(string) {}
			remount(0)
			if strategy != deployments.StrategyMv {
				w.deploy(u, two)
				w.wantVersion("2")
			}
		})
	}
}

// Where there is no room to keep what a first release by rsync would write over, the release waits, nothing is touched,
// and the disk isn't filled.
func TestNoRoomToKeepWhatServes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.mountSrv("size=400k,mode=755")
	w.foreign(func(w *world) error { return os.Symlink("../old", w.dest()) })
	ballast := filepath.Join(w.path("old"), "ballast")
	if err := os.WriteFile(ballast, []byte(strings.Repeat("x", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	u := w.open(func(c *Config) { c.Dir = w.path("srv", "state") })
	p := w.publish("1", func(m *deployments.Manifest) { m.Strategy = deployments.StrategyRsync })
	if err := u.Deploy(t.Context(), Request{Release: p}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	w.wantForeign()
	w.wantHooks()
	if s := u.State(); len(s.Quarantined) > 0 || s.Drained || s.Unfinished {
		t.Errorf("state: %+v", s)
	}
	if _, err := os.Stat(u.beforeDir()); err == nil {
		t.Error("what could be copied was left on the full disk")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	w.deploy(u, p)
	w.wantVersion("1")
}
