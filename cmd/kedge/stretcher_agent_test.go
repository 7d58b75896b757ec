package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/objecttest"
	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/dir"
)

// unitsPerAgent keeps the reports of TestStretchersTable's agents below their bound.
const unitsPerAgent = 50

// convergeStretchers has agents converge to the manifests of runs, a unit each, and compares what they leave with what
// kedge run left. Cases that one environment serves share an agent: commands find the agent's.
func convergeStretchers(
	t *testing.T,
	s3 *objecttest.Server,
	runs map[*stretcherRun]outcome,
	reasons map[string]string,
) {
	t.Helper()
	groups := map[string][]*stretcherRun{}
	for r := range runs {
		key := strings.Join(r.c.env, " ")
		if strings.Contains(key, "DIR") || relativeCommands(r.c.manifest) {
			key = r.key
		}
		groups[key] = append(groups[key], r)
	}
	t.Run("cases", func(t *testing.T) {
		for name, group := range groups {
			slices.SortFunc(group, func(a, b *stretcherRun) int { return strings.Compare(a.key, b.key) })
			for part := range slices.Chunk(group, unitsPerAgent) {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					converge(t, s3, part, runs, reasons)
				})
			}
		}
	})
}

// relativeCommands reports whether a manifest's commands depend on where, and as whom, the agent runs.
func relativeCommands(manifest string) bool {
	uses := func(s string) bool { return strings.Contains(manifest, s) }
	return slices.ContainsFunc([]string{"pwd", "> srv/", "$HOME"}, uses)
}

// converge starts an agent, gives it the units of runs one after the other, and compares.
func converge(
	t *testing.T,
	s3 *objecttest.Server,
	runs []*stretcherRun,
	wanted map[*stretcherRun]outcome,
	reasons map[string]string,
) {
	home := t.TempDir()
	if len(runs) == 1 {
		home = runs[0].dir
	}
	kvDir, state := filepath.Join(t.TempDir(), "kv"), t.TempDir()
	if err := os.Mkdir(kvDir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := dir.Open(kvDir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })

	units := map[string]*stretcherRun{}
	for _, r := range runs {
		r.prepare(t)
		units[r.key] = r
		putRecord(t, store, r, 1, r.c.archive)
	}
	cmd := exec.Command(releasedProgram(t), "agent", "--kv", "file://"+kvDir, "--node", "n1", "--stage", "prod",
		"--roles", "web", "--state-dir", state, "--local-sources", "--verify-every", "0")
	cmd.Env = slices.Concat(
		[]string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "TMPDIR=" + home, "LC_ALL=C", "RUN=1"},
		strings.Split(strings.ReplaceAll(strings.Join(runs[0].c.env, "\x00"), "DIR", home), "\x00"), s3.Env())
	cmd.Dir = home
	var log bytes.Buffer
	var mu sync.Mutex
	cmd.Stdout, cmd.Stderr = lockedWriter{&mu, &log}, lockedWriter{&mu, &log}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})

	ended := awaitOutcomes(t, store, units, 1, wanted)
	second := map[string]*stretcherRun{}
	for key, r := range units {
		if r.c.then != nil {
			second[key] = r
			putRecord(t, store, r, 2, *r.c.then)
		}
	}
	for key, u := range awaitOutcomes(t, store, second, 2, wanted) {
		ended[key] = u
	}
	for _, r := range runs {
		t.Run(r.c.name, func(t *testing.T) {
			failed := ended[r.key].State != deployments.StateConverged
			got := outcome{Failed: failed, Tree: describeTree(t, r.srv()), Hooks: r.hooks()}
			diff := compareOutcomes(got, wanted[r])
			switch {
			case r.c.agent != "" && reasons[r.c.agent] == "":
				t.Errorf("%s has no entry %q", differenceList, r.c.agent)
			case diff != "" && r.c.agent == "":
				t.Errorf("an agent (+) leaves something else than kedge run (-):\n%s\nit reports %s: %s\n%s", diff,
					ended[r.key].State, ended[r.key].Error, linesOf(&mu, &log, r.key))
			case diff == "" && r.c.agent != "":
				t.Errorf("it doesn't differ any more: %s", r.c.agent)
			}
		})
	}
}

// linesOf returns the log's lines that name a unit.
func linesOf(mu *sync.Mutex, log *bytes.Buffer, unit string) string {
	mu.Lock()
	defer mu.Unlock()
	var b strings.Builder
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "unit=prod/web/"+unit+" ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// putRecord publishes a case's manifest, and has its unit run it.
func putRecord(t *testing.T, store kv.Store, r *stretcherRun, generation int64, a archive) {
	t.Helper()
	url := r.publish(t, a)
	manifest, err := os.ReadFile(filepath.Join(r.dir, "manifest.yml"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(manifest)
	record := fmt.Sprintf(`{"target": "%s@sha256:%s", "generation": %d}`, url, hex.EncodeToString(sum[:]), generation)
	key := kv.DesiredKey(deployments.UnitID{Stage: "prod", Role: "web", Unit: r.key})
	if err := store.Commit(t.Context(), nil, kv.Put(key, []byte(record))); err != nil {
		t.Fatal(err)
	}
}

// awaitOutcomes waits until the agent is done with units, one way or the other, and returns what it reports of them.
// What could not be fetched it tries again for ever: that is done once its failure commands ran.
func awaitOutcomes(
	t *testing.T,
	store kv.Store,
	units map[string]*stretcherRun,
	generation int64,
	wanted map[*stretcherRun]outcome,
) map[string]deployments.UnitReport {
	t.Helper()
	ended := map[string]deployments.UnitReport{}
	grace := time.Now().Add(30 * time.Second)
	await(t, "the ends of all units", func() error {
		entry, err := store.Get(t.Context(), kv.StatusKey("prod", "web", "n1"))
		if err != nil {
			return err
		}
		report, err := deployments.ParseReport(entry.Value)
		if err != nil {
			return err
		}
		for key, r := range units {
			u := report.Units[key]
			if u.Generation != generation {
				return fmt.Errorf("%s (%s) is at generation %d", key, r.c.name, u.Generation)
			}
			switch u.State {
			case deployments.StateConverged, deployments.StateQuarantined, deployments.StateInvalid:
			case deployments.StateRetrying:
				if !slices.Equal(r.hooks(), wanted[r].Hooks) && time.Now().Before(grace) {
					return fmt.Errorf("%s (%s) is tried again, and has run %q", key, r.c.name, r.hooks())
				}
			default:
				return fmt.Errorf("%s (%s) is %s: %s", key, r.c.name, u.State, u.Error)
			}
			ended[key] = u
		}
		return nil
	})
	return ended
}
