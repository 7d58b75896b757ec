package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
)

// A unit's report has the newest errors of its log, each once, and no warnings.
func TestRecentErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		recent, start := new(recentErrors), time.Now().UTC()
		log := slog.New(remembering{slog.DiscardHandler, recent}).With("unit", "prod/web/app")
		check := func(want ...string) {
			t.Helper()
			var got []string
			for _, line := range recent.newest() {
				got = append(got, fmt.Sprint(line.Text, " at ", int(line.At.Sub(start)/time.Second)))
			}
			if strings.Join(got, "|") != strings.Join(want, "|") {
				t.Errorf("it has %q, want %q", got, want)
			}
			time.Sleep(time.Second)
		}
		check()
		log.Warn("a warning", "error", errors.New("none of its"))
		check()
		log.Error("the deployment failed", "release", "r2", "step", "post", "error", errors.New("exit status 1\nand more"))
		check("the deployment failed: post: exit status 1 and more at 2")
		log.Error("other")
		log.Error("the deployment failed", "release", "r3", "step", "post", "error", errors.New("exit status 1\nand more"))
		check("the deployment failed: post: exit status 1 and more at 3", "other at 3")
		for range deployments.MaxLoggedErrors {
			log.Error(strings.Repeat("x", 1000) + time.Now().String())
		}
		log.Error("last")
		if lines := recent.newest(); len(lines) != 3 || lines[0].Text != "last" ||
			len(lines[2].Text) > deployments.MaxErrorText {
			t.Errorf("it has %q", lines)
		}
	})
}
