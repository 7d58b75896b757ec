package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// stranger is a user of these tests without an entry in any database.
const stranger = 4321

// asStranger runs f as another user, in a thread of its own, until the function that it returns is called.
func asStranger(t *testing.T, uid int, f func()) (stop func()) {
	t.Helper()
	var stopped atomic.Bool
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread is of no use to anybody else, and ends here
		_, _, err := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		if err == 0 {
			_, _, err = unix.RawSyscall(unix.SYS_SETRESGID, uintptr(uid), uintptr(uid), uintptr(uid))
		}
		if err == 0 {
			_, _, err = unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
		}
		if err != 0 {
			done <- err
			return
		}
		for !stopped.Load() {
			f()
		}
		done <- nil
	}()
	return func() {
		stopped.Store(true)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// Whoever owns the directories around a dest leads nothing that root's agent does out of them, however fast they
// change them.
func TestOwnersOfDestsDirectoryLeadRootNowhere(t *testing.T) {
	t.Parallel()
	home := treetest.OpenHome(t)
	store := t.TempDir()
	var pointers []deployments.Pointer
	for _, version := range []string{"1", "2"} {
		tree := t.TempDir()
		writeVersion(t, tree, version)
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + store, Manifest: deployments.Manifest{
			Name: "app", Version: version, Dest: "/srv/app", Strategy: deployments.StrategyRelease, Shared: []string{"log", "public/uploads"}, Owner: fmt.Sprint(stranger)}})
		if err != nil {
			t.Fatal(err)
		}
		pointers = append(pointers, out.Pointer)
	}
	// Root's, and as tempting as can be: what kedge would empty, remove, fill, chmod or chown, were it led here.
	precious := treetest.Mkdir(t, home+"/precious", 0)
	for _, dir := range []string{"", "app.releases/", ".kedge/", "app.releases/.kedge/", "app.shared/", "public/"} {
		for _, p := range pointers {
			for _, name := range []string{stagingPrefix, healPrefix + "1-", trashPrefix + "1-", "1-", "2-"} {
				treetest.Mkdir(t, filepath.Join(precious, dir, name+p.Digest.Short()), 0)
				treetest.WriteFile(t, filepath.Join(precious, dir, name+p.Digest.Short(), "file"), "precious")
			}
		}
	}
	before := ownersOf(t, precious)
	theirs := treetest.Mkdir(t, home+"/theirs", stranger)
	sub := treetest.Mkdir(t, theirs+"/sub", stranger)
	dest := sub + "/app"
	swap := func(at, to string) func() {
		aside := at + ".aside"
		return func() {
			_ = unix.Rename(at, aside)
			_ = unix.Symlink(to, at)
			_ = unix.Unlink(at)
			_ = unix.Rename(aside, at)
		}
	}
	for _, race := range []func(){swap(sub, precious), swap(dest+".releases", precious), swap(dest+".shared", precious)} {
		stop := asStranger(t, stranger, race)
		done := 0
		for begin := time.Now(); time.Since(begin) < 500*time.Millisecond || done == 0 && time.Since(begin) < 20*time.Second; {
			if err := deployOnce(t, dest, pointers[done%2]); err == nil {
				done++
			}
		}
		stop()
		t.Logf("deployed %d times", done)
		if after := ownersOf(t, precious); after != before {
			t.Fatalf("what root has elsewhere changed:\n%s\nwas\n%s", after, before)
		}
	}
	// Without them it goes on, whatever they left.
	_ = os.Remove(dest)
	if err := deployOnce(t, dest, pointers[0]); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dest, parts[0])); err != nil || string(got) != "1" {
		t.Errorf("dest holds %q, %v", got, err)
	}
}

// deployOnce does all that an agent does with a release's directories.
func deployOnce(t *testing.T, dest string, p deployments.Pointer) error {
	objects := object.New(object.Config{})
	m, raw, err := fetchManifest(t.Context(), objects, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	releases := Open(dest, objects, nil)
	rel, err := releases.Stage(t.Context(), p, m, raw, StageOptions{})
	if err != nil {
		return err
	}
	err = releases.Switch(rel)
	if found, failed := releases.Verify(t.Context(), rel, 0); failed == nil && len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("it differs in %v", found))
	}
	return errors.Join(err, releases.Heal(t.Context(), rel), releases.Prune(0))
}

// ownersOf is snapshot with owners and modes.
func ownersOf(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		err = errors.Join(err, unix.Lstat(p, &st))
		fmt.Fprintf(&b, "%s %o %d:%d\n", strings.TrimPrefix(p, dir), st.Mode, st.Uid, st.Gid)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// runTool is SwitcherConfig.Tool.
func runTool(ctx context.Context, all io.Writer, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if all != nil {
		all.Write(out)
	}
	return out, err
}

// The strategies that write into dest itself follow no link that its owner put there, and copy into nothing that is
// theirs.
func TestCopyingStrategiesFollowNoLinkOfOthers(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("rsync"); err != nil && testing.Short() {
		t.Skip("takes rsync: left out with -short")
	}
	home := treetest.OpenHome(t)
	treetest.MountTmpfs(t, treetest.Mkdir(t, home+"/trees", 0), "size=8m") // so that mv has to copy
	tree := t.TempDir()
	writeVersion(t, tree, "1")
	out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + t.TempDir(), Manifest: template("1")})
	if err != nil {
		t.Fatal(err)
	}
	m, raw, err := fetchManifest(t.Context(), object.New(object.Config{}), out.Pointer, nil)
	if err != nil {
		t.Fatal(err)
	}
	precious := treetest.Mkdir(t, home+"/precious", 0)
	treetest.WriteFile(t, precious+"/file", "precious")
	before := ownersOf(t, precious)
	for _, strategy := range []deployments.Strategy{deployments.StrategyRsync, deployments.StrategyMv} {
		theirs := treetest.Mkdir(t, filepath.Join(home, string(strategy)), stranger)
		treetest.Relink(t, theirs+"/app", precious)
		m.Dest, m.Strategy = theirs+"/app", strategy
		rel := &Release{Pointer: out.Pointer, Manifest: m, Raw: raw}
		switcher := NewSwitcher(m, SwitcherConfig{Objects: object.New(object.Config{}), Trees: home + "/trees",
			Tool: runTool})
		if err := switcher.Stage(t.Context(), rel, StageOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := switcher.Switch(t.Context(), rel); err == nil {
			t.Errorf("%s: it goes through their link", strategy)
		}
		if after := ownersOf(t, precious); after != before {
			t.Errorf("%s: what root has elsewhere changed:\n%s", strategy, after)
		}
		if err := os.Remove(theirs + "/app"); err != nil {
			t.Fatal(err)
		}
		if err := switcher.Switch(t.Context(), rel); err != nil {
			t.Fatal(err)
		}
		if found, err := switcher.Verify(t.Context(), rel, 0); err != nil || len(found) > 0 {
			t.Errorf("%s: %v, %v", strategy, found, err)
		}
		treetest.Same(t, theirs+"/app", tree)
	}
}
