package agent

import (
	"context"
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
	"kedge/kv"
)

// TestMain lets the test's program play an agent of its own process, which can be killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("AGENT_TEST_DIR"); dir != "" {
		if err := play(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func play(dir string) error {
	ctx := context.Background()
	store, err := kv.Open(ctx, kv.Config{URL: "file://" + dir + "/kv"})
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

// TestKilledAgentsEndWhereOthersAre kills agents at random moments while what is desired changes. dest never is anything but a
// complete release, and the next agent ends where it should.
func TestKilledAgentsEndWhereOthersAre(t *testing.T) {
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
	w.desire(base, deployments.Record{Target: bases[0], Generation: 1})
	w.desire(app, deployments.Record{Target: apps[0], Generation: 1, After: []string{"base"}})
	first := w.start()
	first.awaitRunning(app, apps[0])
	first.stop()

	watched := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { watched <- w.watchDest(ctx, "app") }()
	const kills = 12
	generation := int64(1)
	for range kills {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "AGENT_TEST_DIR="+w.dir)
		cmd.Stderr = w.log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(rand.N(700 * time.Millisecond)); time.Now().Before(end); {
			generation++
			w.desire(base, deployments.Record{Target: bases[rand.IntN(len(bases))], Generation: generation})
			w.desire(app, deployments.Record{Target: apps[rand.IntN(len(apps))], Generation: generation, After: []string{"base"}})
			time.Sleep(rand.N(60 * time.Millisecond))
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	generation++
	w.desire(base, deployments.Record{Target: bases[1], Generation: generation})
	w.desire(app, deployments.Record{Target: apps[2], Generation: generation, After: []string{"base"}})
	last := w.start()
	last.awaitRunning(base, bases[1])
	last.awaitRunning(app, apps[2])
	cancel()
	if err := <-watched; err != nil {
		t.Error(err)
	}
	t.Logf("killed %d agents, %d records", kills, 2*generation)
}

// watchDest looks until ctx ends whether unit's dest is a complete release at every moment.
func (w *world) watchDest(ctx context.Context, unit string) error {
	for ctx.Err() == nil {
		dir, err := os.Readlink(w.path("srv", unit))
		if err != nil {
			return fmt.Errorf("dest was gone: %w", err)
		}
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
