package agent

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/deploy"
)

// While a unit has no job, its worker waits for a time to come: for one that has passed, it would
// spin.
func TestWorkerWaitsForATimeToCome(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	one := deployments.Pointer{URL: "s3://b/1", Digest: deployments.Digest{1}}
	two := deployments.Pointer{URL: "s3://b/2", Digest: deployments.Digest{2}}
	releases := []deployments.Pointer{{}, one, two}
	release := func() deployments.Pointer { return releases[r.IntN(len(releases))] }
	flip := func() bool { return r.IntN(2) == 0 }
	now := time.Now()
	at := func() time.Time { // unset, past or to come
		return []time.Time{{}, now.Add(-time.Minute), now, now.Add(time.Minute), now.Add(time.Hour)}[r.IntN(5)]
	}
	idle := 0
	for range 40 {
		opened := openJournal(t, r, release)
		for range 500 {
			u := &unit{id: app, deploy: opened, observes: r.IntN(8) == 0}
			u.decided, u.replaced, u.record.Present = flip(), r.IntN(8) == 0, flip()
			u.done, u.floorRelease, u.nextFloor = release(), release(), release()
			u.raiseFloorAt, u.verifyAt = at(), at()
			if r.IntN(4) == 0 {
				u.retryAt = at()
			}
			if flip() {
				u.future = new(deploy.FutureError)
			}
			if flip() {
				u.lastErr = errors.New("it failed")
			}
			if p := release(); flip() {
				u.refused = map[deployments.Pointer]refusal{p: {err: errors.New("refused")}}
			}
			if flip() {
				u.comparison = &deployments.Compared{Release: release().Digest}
			}
			u.mustRecover, u.mustForget, u.inspected.found = r.IntN(16) == 0, r.IntN(16) == 0, policy.FoundNothing
			u.goal = goal{run: release(), stage: release(), leave: r.IntN(16) == 0, forgetBefore: flip(), heal: flip()}
			if u.observes {
				u.goal = goal{observe: release()}
			}
			j, again := u.choose(now, flip())
			if j.kind == jobNone && !again.IsZero() {
				idle++
				if !again.After(now) {
					t.Fatalf("seed %d: it waits for %v, which is %v ago: %+v, state %+v", seed, again, now.Sub(again),
						u.observed, u.state())
				}
			}
		}
	}
	if idle < 100 {
		t.Errorf("it waited for a time only in %d cases", idle)
	}
}

// openJournal opens a unit with a random journal that may be at rest.
func openJournal(t *testing.T, r *rand.Rand, release func() deployments.Pointer) *deploy.Unit {
	t.Helper()
	journal := map[string]any{"format": 1, "confirmed": r.IntN(4) > 0}
	if p := release(); !p.IsZero() {
		journal["running"], journal["last_good"] = p, p
	}
	if p := release(); !p.IsZero() {
		journal["staged"] = p
	}
	if r.IntN(4) > 0 {
		journal["proven"] = deploy.BootID()
	}
	if r.IntN(4) == 0 {
		journal["quarantined"] = []deploy.Failure{{Digest: deployments.Digest{2}, Step: "pre"}}
	}
	data, err := json.Marshal(journal)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/journal.json", data, 0o600); err != nil {
		t.Fatal(err)
	}
	u, err := deploy.Open(deploy.Config{ID: app, Dir: dir, Node: func() string { return node }})
	if err != nil {
		t.Fatal(err)
	}
	return u
}
