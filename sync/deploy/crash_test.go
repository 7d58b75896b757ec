package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

const crashEnv = "KEDGE_TEST_CRASH"

// plan is what a child process does: recover, then deploy one release after the other.
type plan struct {
	Root     string
	Releases []deployments.Pointer
	// Die has it kill itself at the first point that isn't in the file ROOT/points yet, which it adds there.
	Die bool
	// CutOff stands for maxCutOff.
	CutOff int
	// RaiseFloor has it raise its version floor to what runs, as a node with signers, after the recovery and each release.
	RaiseFloor bool
	// Leave has it leave what runs in the end for what was there before.
	Leave bool
}

func TestMain(m *testing.M) {
	var err error
	if file := os.Getenv(crashEnv); file != "" {
		err = crashChild(file)
	} else if args := os.Getenv(fullEnv); args != "" {
		err = fullChild(strings.Fields(args))
	} else {
		os.Exit(tooltest.Main(m))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// crashChild does a plan as an agent would: what fails isn't tried again, all else is.
func crashChild(file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	c := Config{
		ID:      unitID,
		Node:    func() string { return "n1" },
		Dir:     filepath.Join(p.Root, "state"),
		Objects: object.New(object.Config{}),
	}
	if p.RaiseFloor {
		c.Trust = func(context.Context, deployments.Pointer, []byte) error { return nil }
		if c.Floors, err = OpenFloors(filepath.Join(p.Root, "floors.json"), quiet()); err != nil {
			return err
		}
	}
	u, err := Open(c)
	if err != nil {
		return err
	}
	raiseFloor := func() error {
		if !p.RaiseFloor {
			return nil
		}
		if err := u.RaiseFloor(); err != nil && !errors.As(err, new(*FutureError)) {
			return fmt.Errorf("raise the floor: %w", err)
		}
		return nil
	}
	if p.CutOff > 0 {
		u.maxCutOff = p.CutOff
	}
	points, done := filepath.Join(p.Root, "points"), filepath.Join(p.Root, "done")
	doing := "recover"
	if u.State().Leaving {
		doing = "recover leave"
	}
	u.at = func(point string) {
		if !p.Die {
			return
		}
		point = doing + " " + point + "\n"
		passed, _ := os.ReadFile(points)
		if strings.Contains("\n"+string(passed), "\n"+point) {
			return
		}
		if err := os.WriteFile(points, append(passed, point...), 0o600); err != nil {
			panic(err)
		}
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	var failed *Failed
	if err := u.Recover(context.Background()); err != nil && !errors.As(err, &failed) {
		return fmt.Errorf("recover: %w", err)
	}
	if err := raiseFloor(); err != nil {
		return err
	}
	before, _ := os.ReadFile(done) // a byte for each release that is done with
	for i, r := range p.Releases[len(before):] {
		doing = fmt.Sprintf("release %d", len(before)+i+1)
		err := u.Deploy(context.Background(), Request{Release: r, MayLeave: p.Leave})
		if err != nil && !errors.As(err, &failed) && !errors.Is(err, ErrQuarantined) {
			return fmt.Errorf("deploy: %w", err)
		}
		if err := raiseFloor(); err != nil {
			return err
		}
		if err := os.WriteFile(done, make([]byte, len(before)+i+1), 0o600); err != nil {
			return err
		}
	}
	for doing = "leave"; p.Leave && u.State().Leavable; {
		if err := u.Leave(context.Background()); err != nil {
			return fmt.Errorf("leave: %w", err)
		}
	}
	return nil
}

// story is a sequence of deployments that the sweep cuts off everywhere: the first, an update, one that fails in
// each way, a last.
type story struct {
	*world
	releases []deployments.Pointer
	last     string
	cutOff   int // see plan
}

func newStory(w *world, strategy deployments.Strategy) story {
	set := func(change func(*deployments.Manifest)) func(*deployments.Manifest) {
		return func(m *deployments.Manifest) {
			m.Strategy = strategy
			m.Commands.Post = append(m.Commands.Post, deployments.Command{
				Run: "ln -nfs ../log $KEDGE_DEST/log; mkdir -p $KEDGE_DEST/tmp; " +
					"date > $KEDGE_DEST/tmp/made; date >> $KEDGE_DEST/conf",
			})
			if strategy == deployments.StrategyMv {
				m.Commands.Pre = []deployments.Command{{Run: "rm -rf " + w.dest()}}
			}
			if change != nil {
				change(m)
			}
		}
	}
	return story{w, []deployments.Pointer{
		w.publish("1", set(nil)),
		w.publish("2", set(nil)),
		w.publish("3", set(func(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: "false"}} })),
		w.publish("4", set(func(m *deployments.Manifest) {
			m.Health = deployments.Health{
				Timeout: 10 * time.Millisecond,
				Checks:  []deployments.Check{{Exec: "false", Interval: 5 * time.Millisecond}},
			}
		})),
		w.publish("5", set(nil)),
	}, "5", 1000}
}

// child begins a process that does the story.
func (s story) child(die bool) *exec.Cmd {
	s.t.Helper()
	return s.start(s.planned(plan{Root: s.root, Releases: s.releases, Die: die, CutOff: s.cutOff}))
}

// planned writes a plan, and returns its file.
func (s story) planned(p plan) string {
	s.t.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		s.t.Fatal(err)
	}
	file := s.path("plan.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// start begins a process that does a plan.
func (s story) start(file string) *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), crashEnv+"="+file)
	cmd.Stderr = new(strings.Builder)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return cmd
}

// check is what must hold once all is over, however often it was cut off.
func (s story) check() {
	s.t.Helper()
	if got := s.version(); got != s.last {
		s.t.Errorf("dest holds %q, want %q", got, s.last)
	}
	u := s.open(nil)
	st := u.State()
	want := s.releases[len(s.releases)-1]
	if st.Running != want || st.LastGood != want || !st.Confirmed || st.Drained || st.Unfinished {
		s.t.Errorf("state: %+v", st)
	}
	entries, err := os.ReadDir(s.path("state"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{journalFile, manifestsDir, treesDir, changesDir}, e.Name()) {
			s.t.Errorf("%s was left in the unit's state", e.Name())
		}
	}
	if ds, err := u.Verify(s.t.Context(), 0); err != nil || len(ds) > 0 {
		s.t.Errorf("what the release's commands made is taken for drift: %v, %v", ds, err)
	}
	for dir, keep := range map[string]string{
		manifestsDir: want.Digest.String() + ".json", treesDir: want.Digest.String(),
		changesDir: want.Digest.String() + ".made",
	} {
		entries, err := os.ReadDir(s.path("state", dir))
		if err != nil && !os.IsNotExist(err) {
			s.t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != keep {
				s.t.Errorf("%s was left in %s", e.Name(), dir)
			}
		}
	}
	hooks := s.hooks()
	for _, h := range []string{"post 1", "post 2", "failure 3", "failure 4", "success 5"} {
		if !slices.Contains(hooks, h) {
			s.t.Errorf("%q never ran: %q", h, hooks)
		}
	}
	if n := len(hooks); n == 0 || hooks[n-1] != "success 5" {
		s.t.Errorf("the last hooks: %q", hooks)
	}
}

// watch reads dest in a tight loop until stop: there, it is whole, and once there, it is never away.
func (s story) watch(stop <-chan struct{}, reads *atomic.Int64) {
	seen := false
	for {
		version, err := readVersion(s.dest())
		reads.Add(1)
		switch {
		case err != nil:
			s.t.Errorf("dest is in pieces: %v", err)
			return
		case version == "" && seen:
			s.t.Error("dest was away")
			return
		case version != "":
			seen = true
		}
		select {
		case <-stop:
			return
		default:
			time.Sleep(time.Millisecond)
		}
	}
}

// TestKilledAnywhere kills a process that deploys with SIGKILL, and starts it again: in one story for each strategy
// before and after every step, those of the recovery from the cuts before included; in others at random moments.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	var cuts, reads atomic.Int64
	begin := time.Now()
	tell := func(t *testing.T, strategy deployments.Strategy, run func(s story)) {
		t.Parallel()
		s := newStory(newWorld(t), strategy)
		stop, watched := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(watched)
			if strategy == deployments.StrategyRelease { // the others aren't atomic
				s.watch(stop, &reads)
			}
		}()
		run(s)
		close(stop)
		<-watched
		s.check()
	}
	killed := func(cmd *exec.Cmd) bool {
		err := cmd.Wait()
		if exit := new(exec.ExitError); errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
			cuts.Add(1)
			return true
		}
		if err != nil {
			t.Errorf("%v\n%s", err, cmd.Stderr)
		}
		return false
	}
	t.Run("cuts", func(t *testing.T) {
		strategies := []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv}
		times := 4
		if testing.Short() { // a fifth of the time
			strategies, times = strategies[:1], 0
		}
		for _, strategy := range strategies {
			t.Run(string(strategy), func(t *testing.T) {
				tell(t, strategy, func(s story) {
					for killed(s.child(true)) {
					}
				})
			})
		}
		for i := range times {
			t.Run(fmt.Sprintf("random %d", i), func(t *testing.T) {
				tell(t, deployments.StrategyRelease, func(s story) {
					for range 15 {
						cmd := s.child(false)
						timer := time.AfterFunc(rand.N(300*time.Millisecond), func() { cmd.Process.Kill() })
						cut := killed(cmd)
						timer.Stop()
						if !cut {
							return
						}
					}
					if killed(s.child(false)) {
						s.t.Error("killed by somebody else")
					}
				})
			})
		}
	})
	t.Logf(
		"survived %d cuts, with %d reads of dest meanwhile, in %s",
		cuts.Load(),
		reads.Load(),
		time.Since(begin).Round(time.Second),
	)
}

// TestCutOffCommandIsEndedAndRunAgain kills the agent in the middle of a command that goes on without it.
func TestCutOffCommandIsEndedAndRunAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("1", func(m *deployments.Manifest) {
		m.Commands.Post = []deployments.Command{
			w.hook("first"),
			{
				Run: fmt.Sprintf(
					`if mkdir %s; then kill -KILL $PPID; setsid sh -c 'echo $$ > %[2]s.new; mv %[2]s.new %[2]s; exec sleep 1000'; fi`,
					w.path("once"),
					w.path("pid"),
				),
			},
		}
	})
	s := story{world: w, releases: []deployments.Pointer{p}}
	if cmd := s.child(false); cmd.Wait() == nil {
		t.Fatal("it wasn't cut off")
	}
	until(t, func() bool { return exists(w.path("pid")) })
	if cmd := s.child(false); cmd.Wait() != nil {
		t.Fatalf("then: %s", cmd.Stderr)
	}
	w.wantHooks("pre 1", "first 1", "first 1", "success 1")
	data, err := os.ReadFile(w.path("pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(cmdline) > 0 {
		t.Errorf("what the cut-off command left still runs: %q", cmdline)
	}
}

// A release that ends the agent is tried three times, at any step, and what was good is back. Others go on.
func TestReleaseThatEndsTheAgentFails(t *testing.T) {
	t.Parallel()
	kill := deployments.Command{Run: "kill -KILL $PPID; sleep 1000"}
	for step, change := range map[string]func(*deployments.Manifest){
		"pre":  func(m *deployments.Manifest) { m.Commands.Pre = append(m.Commands.Pre, kill) },
		"post": func(m *deployments.Manifest) { m.Commands.Post = append(m.Commands.Post, kill) },
		"health": func(m *deployments.Manifest) {
			m.Health = deployments.Health{Checks: []deployments.Check{{Exec: kill.Run}}}
		},
	} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			good, bad := w.publish("1", nil), w.publish("2", change)
			s := story{world: w, releases: []deployments.Pointer{good, bad}, last: "1"}
			starts := 0
			for ; starts < 10; starts++ {
				if err := s.child(false).Wait(); err == nil {
					break
				}
			}
			if starts != 3 {
				t.Errorf("it was cut off %d times, want 3", starts)
			}
			w.wantVersion("1")
			st := w.open(nil).State()
			if st.Running != good || !st.Confirmed || st.Drained || st.Unfinished || len(st.Failures) != 1 ||
				st.Failures[0].Step != step {
				t.Errorf("state: %+v", st)
			}
			if hooks := w.hooks(); !slices.Contains(hooks, "failure 2") {
				t.Errorf("failure commands did not run: %q", hooks)
			}
		})
	}
}

// A command that is to run once is not run again, though it ended the agent; those behind it are.
func TestOnceIsNotRunAgain(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"pre", "post"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.publish("1", func(m *deployments.Manifest) {
				list := map[string]*[]deployments.Command{"pre": &m.Commands.Pre, "post": &m.Commands.Post}[step]
				*list = []deployments.Command{w.hook("before"), {Run: "kill -KILL $PPID; sleep 1000", Once: true}, w.hook("after")}
			})
			s := story{world: w, releases: []deployments.Pointer{p}}
			if s.child(false).Wait() == nil {
				t.Fatal("it wasn't cut off")
			}
			if cmd := s.child(false); cmd.Wait() != nil {
				t.Fatalf("then: %s", cmd.Stderr)
			}
			if step == "pre" {
				w.wantHooks("before 1", "before 1", "after 1", "post 1", "success 1")
			} else {
				w.wantHooks("pre 1", "before 1", "before 1", "after 1", "success 1")
			}
			w.wantVersion("1")
		})
	}
}
