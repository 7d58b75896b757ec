package agent

import (
	"context"
	"encoding/json"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/statedir"
)

// written is a store's presence that keeps what it is given.
type written struct {
	mu      sync.Mutex
	reports []deployments.Report
}

func (*written) Close(context.Context) error                             { return nil }
func (*written) Leave(string)                                            {}
func (*written) Joined(context.Context) (uint64, <-chan struct{}, error) { return 1, nil, nil }
func (w *written) Put(_ context.Context, _ string, value []byte) error {
	var r deployments.Report
	err := json.Unmarshal(value, &r)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reports = append(w.reports, r)
	return err
}

func (w *written) read() (n int, last deployments.Report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n = len(w.reports)
	return n, w.reports[n-1]
}

type presenceStore struct {
	kv.Store
	presence kv.Presence
}

func (s presenceStore) Presence(context.Context, string) (kv.Presence, error) { return s.presence, nil }

// Whoever waits for its turn writes what holds when it comes: a row of changes ends in one report more, of the last.
func TestReportsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &written{}
		known, err := cache.Open(cache.Config{
			Node: node, Stage: "prod", Roles: []string{"web"}, File: filepath.Join(t.TempDir(), statedir.LastKnownFile), Log: quiet(),
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range known.Role("web").Sources() {
			known.See(s, kv.View{Synced: true}, time.Now())
		}
		a := &Agent{
			c: Config{Store: presenceStore{presence: store}, Node: node, Stage: "prod", Log: quiet()}, cache: known, metrics: newMetrics(nil),
			drains: newDrains(nil, nil, quiet()), reportNow: wait.NewSignal(),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			a.report(ctx)
		}()
		synctest.Wait()
		for range 3 * reportBurst {
			a.mu.Lock()
			a.begun = a.begun.Add(time.Second)
			a.mu.Unlock()
			a.kickReport()
			synctest.Wait()
		}
		if n, _ := store.read(); n != reportBurst {
			t.Errorf("it wrote %d reports at once, want %d", n, reportBurst)
		}
		time.Sleep(time.Second / reportsPerSecond)
		synctest.Wait()
		if n, last := store.read(); n != reportBurst+1 || !last.Started.Equal(a.begun) {
			t.Errorf("it wrote %d reports, want one more, of %v: %+v", n, a.begun, last)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, _ := store.read(); n != reportBurst+1 {
			t.Errorf("it wrote %d reports of what had not changed", n-reportBurst-1)
		}
		cancel()
		<-done
	})
}
