package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/tooltest"
	"kedge/kv"
	"kedge/kv/open"
)

// TestMain lets the test's program run an agent in its own process, which can be killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("AGENT_TEST_DIR"); dir != "" {
		if err := play(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(tooltest.Main(m))
}

func play(dir string) error {
	ctx := context.Background()
	store, err := open.Store(open.Config{URL: "file://" + dir + "/kv"})
	if err != nil {
		return err
	}
	a, err := New(Config{
		Store: store, Node: node, Stage: "prod", Roles: []string{"web"}, StateDir: dir + "/state", Objects: object.New(object.Config{}),
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// TestKilledAgentsEndWhereOthersAre kills agents at random moments while records and pins change: in their first
// deployment, in updates, and in those that fail and go back. dest is always a complete release, and the next agent
// converges.
func TestKilledAgentsEndWhereOthersAre(t *testing.T) {
	t.Parallel()
	const worlds = 4
	kills := 80
	if testing.Short() {
		kills = 10
	}
	for i := range worlds {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			base := unitID("base")
			var apps, bases []deployments.Pointer
			for i := range 4 {
				change := post("true")
				if i == 3 {
					change = post("exit 1") // one that has to be taken back
				}
				apps = append(apps, w.publishTree("app", fmt.Sprint(i), map[string]string{"a/b": noise(200 << 10), "copy": fmt.Sprint(i)}, change))
				bases = append(bases, w.publish("base", fmt.Sprint(i)))
			}
			changes := int64(0)
			change := func(app0, base0 deployments.Pointer) {
				changes++
				w.desire(base, deployments.Record{Target: base0, Generation: changes})
				w.desire(app, deployments.Record{Target: app0, Generation: changes, After: []string{"base"}})
			}
			change(apps[0], bases[0])
			watched := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			go func() { watched <- w.watchDest(ctx, "app") }()
			pinned := false
			for range kills {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), "AGENT_TEST_DIR="+w.dir)
				cmd.Stderr = w.log
				cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				for end := time.Now().Add(rand.N(250 * time.Millisecond)); time.Now().Before(end); time.Sleep(rand.N(60 * time.Millisecond)) {
					switch rand.IntN(5) {
					case 0:
						w.put(kv.PinKey(app), apps[rand.IntN(len(apps))].String())
						pinned = true
					case 1:
						if pinned {
							w.delete(kv.PinKey(app))
							pinned = false
						}
					default:
						change(apps[rand.IntN(len(apps))], bases[rand.IntN(len(bases))])
					}
				}
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
			if pinned {
				w.delete(kv.PinKey(app))
			}
			change(apps[2], bases[1])
			last := w.start()
			last.awaitRunning(base, bases[1])
			last.awaitRunning(app, apps[2])
			cancel()
			if err := <-watched; err != nil {
				t.Error(err)
			}
			t.Logf("killed %d agents in %d changes", kills, changes)
		})
	}
}

// watchDest checks until ctx ends that unit's dest, once it exists, is a complete release at every moment.
func (w *world) watchDest(ctx context.Context, unit string) error {
	for seen := false; ctx.Err() == nil; {
		dir, err := os.Readlink(w.path("srv", unit))
		if errors.Is(err, os.ErrNotExist) && !seen {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return fmt.Errorf("dest was gone: %w", err)
		}
		seen = true
		version, err := os.ReadFile(w.path("srv", dir, "VERSION"))
		if err != nil {
			return fmt.Errorf("dest was partial: %w", err)
		}
		again, err := os.ReadFile(w.path("srv", dir, "copy"))
		if err != nil || string(again) != string(version) {
			return fmt.Errorf("dest was partial: VERSION %s, copy %s, %w", version, again, err)
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}
