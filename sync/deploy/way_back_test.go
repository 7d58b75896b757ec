package deploy

import (
	"os"
	"path/filepath"
	"testing"

	"kedge/deployments"
)

// From a release behind a link to one that rsync writes, as when a fleet goes back to what it ran before kedge,
// something is served all the while.
func TestFromALinkToRsyncWithoutAGap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	w.deploy(u, w.publish("1", nil))
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for asked := 0; ; asked++ {
			if _, err := os.ReadFile(filepath.Join(w.dest(), "a")); err != nil {
				t.Errorf("after %d reads: %v", asked, err)
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	w.deploy(u, w.publish("2", func(m *deployments.Manifest) { m.Strategy = deployments.StrategyRsync }))
	w.wantVersion("2")
	w.deploy(u, w.publish("3", nil))
	close(stop)
	<-done
	w.wantVersion("3")
	if info, err := os.Lstat(w.dest()); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("dest is %v, %v", info, err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(w.dest()), ".app.kedge-*part*")); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}
