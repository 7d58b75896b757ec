package mirror

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git/gittest"
)

func TestSnapshot(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	taken := make(chan []kv.Entry, 10)
	tries := 0
	m := start(t, Config{Store: dirStore(t), Repo: o.Bare, Snapshot: func(_ context.Context, desired []kv.Entry) error {
		if tries++; tries == 1 {
			return errors.New("no storage yet")
		}
		taken <- desired
		return nil
	}})
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m.runs("prod/web/app", "app/1")
	end := time.After(20 * time.Second)
	for {
		select {
		case entries := <-taken:
			if len(entries) == 1 {
				r, err := deployments.ParseRecord(entries[0].Value)
				if err != nil || r.Target != pointer("app/1") {
					t.Errorf("snapshot %+v, %v", r, err)
				}
				return
			}
		case <-end:
			t.Fatal("no snapshot was taken")
		}
	}
}

// Only what the mirror wrote goes into the signed snapshot, also for a mirror that takes over: no record of
// somebody else, and no change by hand that is yet to be undone.
func TestSnapshotVouchesForNoOther(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	forged := string(encode(deployments.Record{Target: pointer("evil"), Generation: 7, Commit: strings.Repeat("c", 40)}))
	orphan := string(encode(deployments.Record{Target: pointer("evil"), Generation: 7, Commit: strings.Repeat("c", 40), Orphaned: true}))
	for name, value := range map[string]string{"bare": pointer("evil").String(), "forged": forged, "orphan": orphan, "app": forged} {
		put(t, store, "desired/prod/web/"+name, value)
	}
	for i, mirror := range []string{"mirror-1", "mirror-2"} {
		var mu sync.Mutex
		var last []kv.Entry
		m := start(t, Config{Store: store, Repo: o.Bare, Name: mirror, Snapshot: func(_ context.Context, desired []kv.Entry) error {
			mu.Lock()
			defer mu.Unlock()
			for last = desired; len(desired) > 0; desired = desired[1:] {
				if strings.Contains(string(desired[0].Value), `"target":"`+pointer("evil").URL) {
					t.Errorf("%s vouches for %s: %s", mirror, desired[0].Key, desired[0].Value)
				}
			}
			return nil
		}})
		if i == 0 {
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})
		}
		m.runs("prod/web/app", "app/1")
		m.await("a snapshot of what Git names", func() error {
			mu.Lock()
			defer mu.Unlock()
			if len(last) != 2 || last[0].Key != "desired/prod/web/app" || last[1].Key != "desired/prod/web/base" {
				return fmt.Errorf("it has %d records", len(last))
			}
			return nil
		})
		put(t, store, "desired/prod/web/base", forged)
		m.runs("prod/web/base", "base/1")
		put(t, store, "desired/prod/web/late", forged)
		m.at(o.Push(map[string]string{"README.md": mirror}))
		m.stop()
	}
}
