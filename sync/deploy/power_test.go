package deploy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// lossyDisk is a file system in an image, of which a power cut leaves what had reached the device. A unit's state
// and dest lie on it; the rest of a world, the objects and what hooks noted, does not.
type lossyDisk struct {
	w       *world
	kind    string
	options string
	dir     string // the images', and where the newest is mounted
	image   string
	cuts    int
}

// Journals are written as seldom as can be, and what file systems do for programs that forget to sync is turned off.
func newLossyDisk(w *world, kind string) *lossyDisk {
	w.t.Helper()
	d := &lossyDisk{w: w, kind: kind, dir: w.t.TempDir()}
	if err := unix.Mount("tmpfs", d.dir, "tmpfs", 0, "size=1g"); err != nil { // where copies are quick
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := unix.Unmount(d.dir, unix.MNT_DETACH); err != nil {
			w.t.Error(err)
		}
	})
	d.image = filepath.Join(d.dir, "image0")
	switch kind {
	case "ext4":
		d.options = "loop,commit=300,noauto_da_alloc"
		d.run("truncate", "-s", "32M", d.image)
		d.run("/usr/sbin/mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", d.image)
	case "xfs":
		d.options = "loop,nouuid" // of the image before, which may be mounted yet
		d.run("truncate", "-s", "320M", d.image)
		d.run("/usr/sbin/mkfs.xfs", "-q", d.image)
	}
	d.mount()
	for _, name := range []string{"state", "srv"} {
		if err := os.MkdirAll(filepath.Join(d.dir, "disk", name), 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	d.bind()
	unix.Sync()
	w.t.Cleanup(d.unmount)
	return d
}

func (d *lossyDisk) run(name string, args ...string) {
	d.w.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.w.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

func (d *lossyDisk) mount() {
	d.w.t.Helper()
	if err := os.MkdirAll(filepath.Join(d.dir, "disk"), 0o755); err != nil {
		d.w.t.Fatal(err)
	}
	d.run("mount", "-t", d.kind, "-o", d.options, d.image, filepath.Join(d.dir, "disk"))
}

func (d *lossyDisk) bind() {
	d.w.t.Helper()
	for _, name := range []string{"state", "srv"} {
		if err := os.MkdirAll(d.w.path(name), 0o755); err != nil {
			d.w.t.Fatal(err)
		}
		if err := unix.Mount(filepath.Join(d.dir, "disk", name), d.w.path(name), "", unix.MS_BIND, ""); err != nil {
			d.w.t.Fatal(err)
		}
	}
}

func (d *lossyDisk) unmount() {
	for _, dir := range []string{d.w.path("state"), d.w.path("srv"), filepath.Join(d.dir, "disk")} {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			d.w.t.Errorf("unmounting %s: %v", dir, err)
		}
	}
}

// cut takes the power away, and gives it back: what is mounted then is a copy of the image as it was. Nobody may be
// writing.
func (d *lossyDisk) cut() {
	d.w.t.Helper()
	d.cuts++
	next := filepath.Join(d.dir, fmt.Sprintf("image%d", d.cuts))
	for changed := true; changed; { // by the kernel's own writing back, in the middle of the copy
		before := d.written()
		d.run("cp", "--sparse=always", d.image, next)
		changed = before != d.written()
	}
	d.unmount()
	if err := os.Remove(d.image); err != nil {
		d.w.t.Fatal(err)
	}
	d.image = next
	d.mount()
	d.bind()
}

func (d *lossyDisk) written() syscall.Timespec {
	d.w.t.Helper()
	info, err := os.Stat(d.image)
	if err != nil {
		d.w.t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Mtim
}

// TestPowerCuts tells the story of TestKilledAnywhere with the power cut before and after each step, and at random
// moments. After each, what the disk holds is whole, and the next start goes on to the same end.
func TestPowerCuts(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	for _, kind := range []string{"ext4", "xfs"} {
		for name, random := range map[string]int{"every step": 0, "random": 40} {
			t.Run(kind+" "+name, func(t *testing.T) {
				if testing.Short() && kind != "ext4" {
					t.Skip("takes seconds: left out with -short")
				}
				t.Parallel()
				w := newWorld(t)
				d := newLossyDisk(w, kind)
				s := newStory(w, deployments.StrategyRelease)
				seen := false
				for n := 0; random == 0 || n <= random; n++ {
					cmd := s.child(random == 0)
					if n < random {
						time.AfterFunc(rand.N(60*time.Millisecond), func() { cmd.Process.Kill() })
					}
					err := cmd.Wait()
					exit := new(exec.ExitError)
					if err != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL) {
						t.Fatalf("%v\n%s", err, cmd.Stderr)
					}
					if err == nil {
						break
					}
					d.cut()
					version, err := readVersion(w.dest())
					done, _ := os.ReadFile(w.path("done"))
					if err != nil || version == "" && (seen || len(done) > 0) {
						t.Fatalf("after power cut %d, with %d releases done, dest holds %q: %v", d.cuts, len(done), version, err)
					}
					seen = seen || version != ""
				}
				if random == 0 && d.cuts < 50 {
					t.Errorf("only %d power cuts", d.cuts)
				}
				d.cut() // also what was said to be done is on the disk
				s.check()
				t.Logf("survived %d power cuts", d.cuts)
			})
		}
	}
}
