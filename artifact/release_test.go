package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// killPlan is what a child process does until it is killed.
type killPlan struct {
	Dest     string
	Pointers []deployments.Pointer
	KillAt   int  // the number of the step to die at; -1: none
	Forever  bool // deploy the releases in turn until killed from outside
	Heal     bool // the last one, before old ones are pruned
	UID      int  // to run as; 0: as the test
}

// fetchManifest reads and parses the manifest that p points to.
func fetchManifest(
	ctx context.Context,
	objects *object.Client,
	p deployments.Pointer,
	env func(string) (string, bool),
) (*deployments.Manifest, []byte, error) {
	raw, err := ReadManifest(ctx, objects, p)
	if err != nil {
		return nil, nil, err
	}
	m, err := deployments.ParseManifest(raw, p.URL, env)
	return m, raw, err
}

const killEnv = "KEDGE_TEST_KILL_PLAN"

func TestMain(m *testing.M) {
	if text := os.Getenv(killEnv); text != "" {
		if err := deployAll(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if text := os.Getenv(benchEnv); text != "" {
		if err := playFetch(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Each of rapid's trees is packed, fetched four ways and compared: a hundred take minutes. -rapid.checks=N tries more.
	flag.Set("rapid.checks", "8")
	os.Exit(tooltest.Main(m))
}

// deployAll stages and switches to each release in turn, and then prunes all but the last.
func deployAll(text string) error {
	var plan killPlan
	if err := json.Unmarshal([]byte(text), &plan); err != nil {
		return err
	}
	if plan.UID > 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(plan.UID), syscall.Setuid(plan.UID)); err != nil {
			return err
		}
	}
	ctx := context.Background()
	objects := object.New(object.Config{})
	releases := Open(plan.Dest, objects, nil)
	step := 0
	releases.step = func(string) {
		if step == plan.KillAt {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		step++
	}
	for {
		for _, p := range plan.Pointers {
			m, raw, err := fetchManifest(ctx, objects, p, nil)
			if err != nil {
				return err
			}
			rel, err := releases.Stage(ctx, p, m, raw, StageOptions{})
			if err != nil {
				return err
			}
			if err := releases.Switch(rel); err != nil {
				return err
			}
		}
		if plan.Heal {
			rel, err := releases.Current()
			if err != nil {
				return err
			}
			if err := releases.Heal(ctx, rel); err != nil {
				return err
			}
		}
		if err := releases.Prune(0); err != nil {
			return err
		}
		if !plan.Forever {
			return nil
		}
	}
}

func runPlan(t *testing.T, plan killPlan, within time.Duration) (killed bool) {
	t.Helper()
	text, err := json.Marshal(plan)
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), killEnv+"="+string(text))
	var out strings.Builder
	child.Stderr = &out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if within > 0 {
		timer := time.AfterFunc(within, func() { child.Process.Kill() })
		defer timer.Stop()
	}
	err = child.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("the child failed: %v: %s", err, out.String())
	}
	return false
}

// parts are the files that each release has; all hold its version.
var parts = []string{"VERSION", "a/one", "a/two", "b/c/three"}

func writeVersion(t testing.TB, dir, version string) {
	t.Helper()
	for _, p := range parts {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(p)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, p), []byte(version), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// whole reads what dest holds, and fails unless it is all of one version.
func whole(dest string) error {
	for {
		root, err := through(dest, os.OpenRoot)
		if err != nil {
			return err
		}
		err = readParts(root)
		opened, openedErr := root.Stat(".")
		now, nowErr := through(dest, os.Stat)
		root.Close()
		if err == nil || openedErr != nil || nowErr != nil || os.SameFile(opened, now) {
			return errors.Join(err, openedErr, nowErr)
		}
		// It was switched while it was read, and the old one perhaps removed: read again.
	}
}

// through follows dest. Between the two halves of that, the release that it led to may be switched away from and
// pruned.
func through[T any](dest string, follow func(string) (T, error)) (T, error) {
	for {
		led, _ := os.Readlink(dest)
		got, err := follow(dest)
		if err != nil {
			if now, gone := os.Readlink(dest); gone == nil && now != led {
				continue
			}
		}
		return got, err
	}
}

func readParts(root *os.Root) error {
	version := ""
	for _, p := range parts {
		data, err := root.ReadFile(p)
		if err != nil {
			return err
		}
		if version == "" {
			version = string(data)
		}
		if version == "" || string(data) != version {
			return fmt.Errorf("%s holds %q in a release of %q", p, data, version)
		}
	}
	return nil
}

// watch reads dest in a tight loop until the returned function is called.
func watch(t *testing.T, dest string) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if err := whole(dest); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("dest was not whole: %v", err)
		}
	}
}

func publishVersions(t testing.TB, store string, versions ...string) (pointers []deployments.Pointer) {
	t.Helper()
	for _, v := range versions {
		dir := t.TempDir()
		writeVersion(t, dir, v)
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: dir, To: "file://" + store,
			Manifest: deployments.Manifest{Name: "app", Version: v, Dest: "/srv/app", Strategy: deployments.StrategyRelease}})
		if err != nil {
			t.Fatal(err)
		}
		pointers = append(pointers, out.Pointer)
	}
	return pointers
}

// Killed at every step, before and after it, the next run ends in the same place, and dest was whole all the while:
// first the directory of before kedge, then one release or the other.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	pointers := publishVersions(t, t.TempDir(), "1", "2")
	for n := 0; ; n++ {
		dest := filepath.Join(t.TempDir(), "app")
		writeVersion(t, dest, "before")
		plan := killPlan{Dest: dest, Pointers: pointers, KillAt: n}
		stop := watch(t, dest)
		killed := runPlan(t, plan, 0)
		plan.KillAt = -1
		runPlan(t, plan, 0)
		stop()
		if got, _ := os.ReadFile(filepath.Join(dest, "VERSION")); string(got) != "2" {
			t.Fatalf("killed at step %d, it ends with version %q", n, got)
		}
		name := nameOf("2", pointers[1].Digest)
		if got, want := treetest.List(t, filepath.Join(dest+".releases", ".kedge")), []string{name + indexSuffix,
			name + recordSuffix, name + statsSuffix}; !slices.Equal(got, want) {
			t.Fatalf("killed at step %d, it leaves %q", n, got)
		}
		left := treetest.List(t, dest+".releases")
		if len(left) != 3 || !strings.HasPrefix(left[2], adoptedPrefix) || whole(filepath.Join(dest+".releases", left[2])) != nil {
			t.Fatalf("killed at step %d, it leaves %q", n, left)
		}
		if !killed {
			if n < 15 {
				t.Fatalf("there are %d steps only", n)
			}
			return
		}
	}
}

// A directory that has a release's name and no record is never taken for the release, whenever the stage that
// replaces it is killed; and dest, which leads to it, is whole all the while.
func TestAKillWhileADirectoryIsReplaced(t *testing.T) {
	t.Parallel()
	pointers := publishVersions(t, t.TempDir(), "1")
	for n := 0; ; n++ {
		dest := filepath.Join(t.TempDir(), "app")
		dir := filepath.Join(dest+".releases", nameOf("1", pointers[0].Digest))
		writeVersion(t, dir, "not of 1")
		if err := os.Symlink(filepath.Join("app.releases", filepath.Base(dir)), dest); err != nil {
			t.Fatal(err)
		}
		stop := watch(t, dest)
		killed := runPlan(t, killPlan{Dest: dest, Pointers: pointers, KillAt: n}, 0)
		runPlan(t, killPlan{Dest: dest, Pointers: pointers, KillAt: -1}, 0)
		stop()
		if got, _ := os.ReadFile(filepath.Join(dest, "VERSION")); string(got) != "1" {
			t.Errorf("killed at step %d, it ends with version %q", n, got)
		}
		if !killed {
			return
		}
	}
}

// A release has its mode also where a kill came between its name and that.
func TestModeAfterAKill(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	writeVersion(t, tree, "1")
	out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + t.TempDir(),
		Manifest: deployments.Manifest{Name: "app", Version: "1", Dest: "/srv/app", DestMode: 0o550, Strategy: deployments.StrategyRelease}})
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		dest := filepath.Join(treetest.TempDir(t), "app")
		plan := killPlan{Dest: dest, Pointers: []deployments.Pointer{out.Pointer}, KillAt: n}
		killed := runPlan(t, plan, 0)
		plan.KillAt = -1
		runPlan(t, plan, 0)
		if info, err := os.Stat(dest); err != nil || info.Mode().Perm() != 0o550 {
			t.Errorf("killed at step %d, its mode is %v, %v", n, info.Mode(), err)
		}
		if !killed {
			return
		}
	}
}

func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	pointers := publishVersions(t, t.TempDir(), "1", "2", "3")
	dest := filepath.Join(t.TempDir(), "app")
	writeVersion(t, dest, "before")
	stop := watch(t, dest)
	for range 12 {
		runPlan(t, killPlan{Dest: dest, Pointers: pointers, KillAt: -1, Forever: true}, time.Duration(50+rand.IntN(300))*time.Millisecond)
	}
	runPlan(t, killPlan{Dest: dest, Pointers: pointers, KillAt: -1}, 0)
	stop()
	if got, _ := os.ReadFile(filepath.Join(dest, "VERSION")); string(got) != "3" {
		t.Errorf("it ends with version %q", got)
	}
}

func stageOne(t testing.TB, releases *Releases, p deployments.Pointer) *Release {
	t.Helper()
	m, raw, err := fetchManifest(t.Context(), releases.objects, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	rel, err := releases.Stage(t.Context(), p, m, raw, StageOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return rel
}

func TestReleasesOfOneDest(t *testing.T) {
	t.Parallel()
	pointers := publishVersions(t, t.TempDir(), "1", "2", "3", "4")
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	if _, err := releases.Current(); !errors.Is(err, ErrNoRelease) {
		t.Errorf("before all: %v", err)
	}
	for _, p := range pointers {
		if _, err := releases.Find(p.Digest); !errors.Is(err, ErrNoRelease) {
			t.Errorf("before it was staged: %v", err)
		}
		rel := stageOne(t, releases, p)
		if err := releases.Switch(rel); err != nil {
			t.Fatal(err)
		}
		if again := stageOne(t, releases, p); again.Dir != rel.Dir {
			t.Errorf("staged twice: %s and %s", again.Dir, rel.Dir)
		}
		live, err := releases.Current()
		if err != nil || live.Pointer != p || live.Manifest.Version != rel.Manifest.Version {
			t.Fatalf("live is %v, %v", live, err)
		}
	}
	first, err := releases.Find(pointers[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	second, err := releases.Find(pointers[1].Digest)
	if err != nil {
		t.Fatal(err)
	}
	for _, rel := range []*Release{second, first} { // the newest are those that ran last
		if err := releases.Switch(rel); err != nil {
			t.Fatal(err)
		}
	}
	if err := releases.Prune(1, pointers[2].Digest); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, true, true, false} { // live, the newest of the others, protected, old
		if _, err := releases.Find(pointers[i].Digest); (err == nil) != want {
			t.Errorf("release %d is there: %v", i+1, !want)
		}
	}

	// A directory elsewhere is no release of this dest's, whatever its name.
	elsewhere := filepath.Join(t.TempDir(), filepath.Base(second.Dir))
	if err := os.Mkdir(elsewhere, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := releases.Switch(&Release{Pointer: second.Pointer, Manifest: second.Manifest, Raw: second.Raw, Dir: elsewhere}); !errors.Is(err, ErrNoRelease) {
		t.Errorf("switched to %s: %v", elsewhere, err)
	}
	treetest.Relink(t, releases.dest, elsewhere)
	if rel, err := releases.Current(); !errors.Is(err, ErrNoRelease) {
		t.Errorf("current is %v, %v", rel, err)
	}
	// Nor is a file.
	if err := errors.Join(os.RemoveAll(second.Dir), os.WriteFile(second.Dir, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if rel, err := releases.Find(second.Pointer.Digest); !errors.Is(err, ErrNoRelease) {
		t.Errorf("found %v, %v", rel, err)
	}
}

// What is being staged is nobody else's to see or to write into, whatever was there.
func TestStagingIsPrivate(t *testing.T) {
	t.Parallel()
	p := publishVersions(t, t.TempDir(), "1")[0]
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	staging := filepath.Join(releases.private(), stagingPrefix+p.Digest.Short())
	if err := os.MkdirAll(staging, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{releases.private(), staging} {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	looked := false
	releases.step = func(name string) {
		if name != "fetch" {
			return
		}
		looked = true
		for _, dir := range []string{releases.private(), staging} {
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("%s: %v, %v", dir, info.Mode(), err)
			}
		}
	}
	rel := stageOne(t, releases, p)
	if !looked {
		t.Error("nothing was fetched")
	}
	for _, suffix := range []string{recordSuffix, indexSuffix} {
		if info, err := os.Stat(filepath.Join(releases.private(), filepath.Base(rel.Dir)+suffix)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", suffix, info, err)
		}
	}
}

// A live release whose record was lost or damaged must stay, and dest must lead somewhere while it is staged again.
func TestDamagedRecordOfTheLiveRelease(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(string) error{
		"lost": os.Remove, "empty": func(p string) error { return os.Truncate(p, 0) },
		"of nothing":     func(p string) error { return os.WriteFile(p, []byte("{}"), 0o600) },
		"all of it lost": func(p string) error { return os.RemoveAll(filepath.Dir(p)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pointers := publishVersions(t, t.TempDir(), "1")
			releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
			rel := stageOne(t, releases, pointers[0])
			if err := releases.Switch(rel); err != nil {
				t.Fatal(err)
			}
			stop := watch(t, releases.dest)
			if err := damage(filepath.Join(releases.private(), filepath.Base(rel.Dir)+recordSuffix)); err != nil {
				t.Fatal(err)
			}
			if _, err := releases.Current(); !errors.Is(err, ErrNoRelease) {
				t.Errorf("current: %v", err)
			}
			if err := releases.Prune(0); err != nil {
				t.Error(err)
			}
			stageOne(t, releases, pointers[0])
			stop()
			if _, err := releases.Current(); err != nil {
				t.Errorf("staged again, it is not current: %v", err)
			}
		})
	}
}

func TestVerifyFindsADamagedIndex(t *testing.T) {
	t.Parallel()
	pointers := publishVersions(t, t.TempDir(), "1")
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	rel := stageOne(t, releases, pointers[0])
	if found, err := releases.Verify(t.Context(), rel, 0); err != nil || len(found) > 0 {
		t.Fatalf("a whole release: %v, %v", found, err)
	}
	if err := os.WriteFile(filepath.Join(rel.Dir, "a/one"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if found, err := releases.Verify(t.Context(), rel, 0); err != nil || len(found) != 1 || found[0].Path != "a/one" {
		t.Errorf("a damaged file: %v, %v", found, err)
	}
	flip(t, filepath.Join(releases.private(), filepath.Base(rel.Dir)+indexSuffix), 20)
	if found, err := releases.Verify(t.Context(), rel, 0); err != nil || !slices.Equal(found, []Difference{{".", "index"}}) {
		t.Errorf("a damaged index: %v, %v", found, err)
	}
	if err := releases.Heal(t.Context(), rel); err != nil {
		t.Fatal(err)
	}
	if found, err := releases.Verify(t.Context(), rel, 0); err != nil || len(found) > 0 {
		t.Errorf("healed: %v, %v", found, err)
	}
	// The top directory's mode is the manifest's to say; as with other directories, its set-group-id bit is not.
	for mode, want := range map[fs.FileMode][]Difference{0o775: {{".", "mode"}}, 0o755 | fs.ModeSticky: {{".", "mode"}}, 0o755 | fs.ModeSetgid: nil} {
		if err := os.Chmod(rel.Dir, mode); err != nil {
			t.Fatal(err)
		}
		if found, err := releases.Verify(t.Context(), rel, 0); err != nil || !slices.Equal(found, want) {
			t.Errorf("its top with mode %v: %v, %v", mode, found, err)
		}
		if err := releases.Heal(t.Context(), rel); err != nil {
			t.Fatal(err)
		}
		if found, err := releases.Verify(t.Context(), rel, 0); err != nil || len(found) > 0 {
			t.Errorf("healed of mode %v: %v, %v", mode, found, err)
		}
	}
}

func TestManifestWithAnotherDigest(t *testing.T) {
	t.Parallel()
	p := publishVersions(t, t.TempDir(), "1")[0]
	p.Digest[0] ^= 1
	objects := object.New(object.Config{})
	if _, _, err := fetchManifest(t.Context(), objects, p, nil); !errors.Is(err, deployments.ErrDigest) {
		t.Errorf("%v", err)
	}
	right := p
	right.Digest[0] ^= 1
	m, raw, err := fetchManifest(t.Context(), objects, right, nil)
	if err != nil {
		t.Fatal(err)
	}
	releases := Open(filepath.Join(t.TempDir(), "app"), objects, nil)
	if _, err := releases.Stage(t.Context(), p, m, raw, StageOptions{}); !errors.Is(err, deployments.ErrDigest) {
		t.Errorf("stage: %v", err)
	}
}

// Commands alone are no tree: nothing is made, and nothing begun.
func TestAManifestWithoutATree(t *testing.T) {
	t.Parallel()
	objects := object.New(object.Config{})
	raw := []byte("manifest")
	p := deployments.Pointer{URL: "file:///m", Digest: deployments.DigestOf(raw)}
	releases := Open(filepath.Join(t.TempDir(), "app"), objects, nil)
	if _, err := releases.Stage(t.Context(), p, &deployments.Manifest{DestMode: 0o755}, raw, StageOptions{}); err == nil || !strings.Contains(err.Error(), "commands only") {
		t.Errorf("stage: %v", err)
	}
	if _, err := os.Stat(releases.top()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it made %s: %v", releases.top(), err)
	}
	if err := Unpack(t.Context(), objects, &deployments.Manifest{}, t.TempDir(), StageOptions{}); err == nil || !strings.Contains(err.Error(), "commands only") {
		t.Errorf("unpack: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	small := t.TempDir()
	treetest.MountTmpfs(t, small, "size=1m")
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "large"), []byte(treetest.Noise(1, 3<<20)), 0o644); err != nil {
		t.Fatal(err)
	}
	objects := object.New(object.Config{})
	out, err := Publish(t.Context(), objects, PublishOptions{Dir: tree, To: "file://" + t.TempDir(),
		Manifest: deployments.Manifest{Name: "app", Version: "1", Dest: "/srv/app", Strategy: deployments.StrategyRelease}})
	if err != nil {
		t.Fatal(err)
	}
	m, raw, err := fetchManifest(t.Context(), objects, out.Pointer, nil)
	if err != nil {
		t.Fatal(err)
	}
	plain := *m
	plain.Index = nil
	for name, m := range map[string]*deployments.Manifest{"indexed": m, "plain": &plain} {
		releases := Open(filepath.Join(small, name), objects, nil)
		_, before := objects.Requests()
		if _, err := releases.Stage(t.Context(), out.Pointer, m, raw, StageOptions{}); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v", name, err)
		}
		if _, read := objects.Requests(); read-before > out.Index {
			t.Errorf("%s: it took %d bytes to see that", name, read-before)
		}
		if left := treetest.List(t, releases.private()); len(left) > 0 {
			t.Errorf("%s: it leaves %q", name, left)
		}
	}
}

func TestOwnerAndMode(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	tree := t.TempDir()
	writeVersion(t, tree, "1")
	treetest.Relink(t, filepath.Join(tree, "link"), "VERSION")
	objects := object.New(object.Config{})
	out, err := Publish(t.Context(), objects, PublishOptions{Dir: tree, To: "file://" + t.TempDir(),
		Manifest: deployments.Manifest{Name: "app", Version: "1", Dest: "/srv/app", DestMode: 0o550, Owner: "4321:1234", Strategy: deployments.StrategyRelease}})
	if err != nil {
		t.Fatal(err)
	}
	releases := Open(filepath.Join(t.TempDir(), "app"), objects, nil)
	rel := stageOne(t, releases, out.Pointer)
	err = filepath.WalkDir(rel.Dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 4321 || st.Gid != 1234 {
			t.Errorf("%s belongs to %d:%d", p, st.Uid, st.Gid)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(rel.Dir); info.Mode().Perm() != 0o550 {
		t.Errorf("its mode is %v", info.Mode())
	}
	for owner, want := range map[string]int{"": 0, "4321": 0, ":1234": 0, "4321:1234": 0, "1": 9, ":1": 9, "4321:1": 9, "1:1234": 9} {
		for _, skip := range [][]string{nil, {"."}} { // the latter if it is a mount itself
			if found, err := verifyOwner(t.Context(), rel.Dir, owner, skip, nil); err != nil || len(found) != want {
				t.Errorf("%d paths are not of %q, want %d: %v", len(found), owner, want, err)
			}
		}
	}
	if err := os.Lchown(filepath.Join(rel.Dir, "a/one"), 1, 1); err != nil {
		t.Fatal(err)
	}
	if found, err := releases.Verify(t.Context(), rel, 0); err != nil || len(found) != 1 || found[0].What != "owner" {
		t.Errorf("%v, %v", found, err)
	}
}

// The kernel takes the lower 32 bits of a number, and all ones for no change.
func TestOwnersOfAManifest(t *testing.T) {
	t.Parallel()
	group, err := user.LookupGroup("daemon")
	if err != nil {
		t.Fatal(err)
	}
	daemon, err := strconv.Atoi(group.Gid)
	if err != nil {
		t.Fatal(err)
	}
	for owner, want := range map[string][2]int{
		"": {-1, -1}, "12": {12, -1}, ":34": {-1, 34}, "12:34": {12, 34}, "root": {0, -1}, ":daemon": {-1, daemon}, "root:daemon": {0, daemon},
		"12:daemon": {12, daemon}, "4294967294": {1<<32 - 2, -1},
	} {
		if uid, gid, err := safefs.LookupOwner(owner); err != nil || uid != want[0] || gid != want[1] {
			t.Errorf("%q is %d, %d, %v", owner, uid, gid, err)
		}
	}
	for _, owner := range []string{"nobody-here", ":nobody-here", "root:nobody-here", "4294967295", ":4294967295", "4294967296", "0:4294967296"} {
		if uid, gid, err := safefs.LookupOwner(owner); err == nil || uid != -1 || gid != -1 || !strings.Contains(err.Error(),
			owner) {
			t.Errorf("%q is %d, %d, %v", owner, uid, gid, err)
		}
	}
}

// Whose tree it is to be is asked before it is fetched.
func TestUnknownOwner(t *testing.T) {
	t.Parallel()
	p := publishTree(t, t.TempDir())
	p.manifest.Owner = "nobody-here"
	objects := object.New(object.Config{})
	if err := Unpack(t.Context(), objects, p.manifest, t.TempDir(), StageOptions{}); err == nil || !strings.Contains(err.Error(), "nobody-here") {
		t.Errorf("an owner that isn't there: %v", err)
	}
	if requests, _ := objects.Requests(); requests != 0 {
		t.Errorf("%d requests were made for it", requests)
	}
}

func TestWhatStandsAtDest(t *testing.T) {
	t.Parallel()
	pointers := publishVersions(t, t.TempDir(), "1")
	for name, c := range map[string]struct {
		place func(dest string) error
		fails bool
		kept  int // of what was there
	}{
		"a file":                  {func(dest string) error { return os.WriteFile(dest, []byte("x"), 0o644) }, true, 0},
		"a link of somebody's":    {func(dest string) error { return os.Symlink("/etc", dest) }, false, 0},
		"a link to nothing":       {func(dest string) error { return os.Symlink("nothing", dest) }, false, 0},
		"a directory with things": {func(dest string) error { return os.MkdirAll(filepath.Join(dest, "x"), 0o755) }, false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
			if err := c.place(releases.dest); err != nil {
				t.Fatal(err)
			}
			rel := stageOne(t, releases, pointers[0])
			if err := releases.Switch(rel); (err != nil) != c.fails {
				t.Fatalf("switch: %v", err)
			}
			if c.fails {
				if data, err := os.ReadFile(releases.dest); err != nil || string(data) != "x" {
					t.Errorf("it holds %q, %v", data, err)
				}
				return
			}
			if err := whole(releases.dest); err != nil {
				t.Error(err)
			}
			kept, err := filepath.Glob(filepath.Join(releases.top(), adoptedPrefix+"*", "x"))
			if err != nil || len(kept) != c.kept {
				t.Errorf("it keeps %q, %v", kept, err)
			}
		})
	}
}
