package deploy

import (
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"kedge/sync/command"
)

func TestDeploymentLog(t *testing.T) {
	t.Parallel()
	text := new(deploymentLog)
	log := slog.New(tee{next: quiet().Handler(), text: text})
	log.Debug("not for hooks")
	log.With("unit", "app").Info("deploying", "version", "2")
	log.Info("output", command.LineKey, "what a command said")
	log.Error("it failed")
	const stamp = `\d{4}/\d\d/\d\d \d\d:\d\d:\d\d `
	want := "^" + stamp + "deploying unit=app version=2\n" + stamp + "output: what a command said\n" + stamp + "ERROR it failed\n$"
	if got := text.bytes(); !regexp.MustCompile(want).Match(got) {
		t.Errorf("got\n%s", got)
	}

	text.reset()
	for i := range 20_000 {
		log.Info(fmt.Sprintf("line %d", i))
	}
	got := string(text.bytes())
	if len(got) > maxLog+100 || !strings.Contains(got[:100], "line 0\n") || !strings.HasSuffix(got, "line 19999\n") || !strings.Contains(got, "bytes left out]") {
		t.Errorf("%d bytes: %.60q … %q", len(got), got, got[len(got)-60:])
	}
}
