package agent

import (
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// BenchmarkPutToSwitch measures the time from a written record until the release is live, for a small release that
// is already on disk.
func BenchmarkPutToSwitch(b *testing.B) {
	w := newWorld(b)
	releases := []deployments.Pointer{w.publish("app", "0"), w.publish("app", "1")}
	a := w.start()
	for _, p := range releases {
		w.put(kv.DesiredKey(app), p.String())
		a.awaitRunning(app, p)
	}
	for i := range b.N {
		want := []string{"0", "1"}[i%2]
		b.StopTimer()
		w.put(kv.DesiredKey(app), releases[(i+1)%2].String())
		a.awaitRunning(app, releases[(i+1)%2])
		b.StartTimer()
		w.put(kv.DesiredKey(app), releases[i%2].String())
		for w.live("app") != want {
			time.Sleep(100 * time.Microsecond)
		}
	}
}
