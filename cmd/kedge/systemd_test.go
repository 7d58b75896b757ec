package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/policy"
)

// The journal tells a line's priority by its prefix.
func TestJournalPriorities(t *testing.T) {
	t.Parallel()
	for format, handler := range map[string]func(w journalWriter, opt *slog.HandlerOptions) slog.Handler{
		"text": func(w journalWriter, opt *slog.HandlerOptions) slog.Handler { return slog.NewTextHandler(w, opt) },
		"json": func(w journalWriter, opt *slog.HandlerOptions) slog.Handler { return slog.NewJSONHandler(w, opt) },
	} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			opt := &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: withoutTime}
			log := slog.New(handler(journalWriter{&out}, opt)).With("unit", "prod/web/app").WithGroup("group")
			for level, prefix := range map[slog.Level]string{slog.LevelDebug: "<7>", slog.LevelInfo: "<6>", slog.LevelWarn: "<4>", slog.LevelError: "<3>"} {
				out.Reset()
				log.Log(t.Context(), level, "said level=ERROR", "time", "kept\nlevel=ERROR")
				line := out.String()
				if !strings.HasPrefix(line, prefix) || strings.Count(line, "\n") != 1 || !strings.Contains(line, "kept") {
					t.Errorf("%s is written as %q, want it to begin with %s", level, line, prefix)
				}
			}
		})
	}
}

func TestStatusLine(t *testing.T) {
	t.Parallel()
	s := policy.NodeStatus{Ready: true, Roles: map[string]deployments.Report{
		"web":   {Units: map[string]deployments.UnitReport{"app": {Version: "2", State: deployments.StateConverged}, "base": {State: deployments.StateHeld}}},
		"cache": {Units: map[string]deployments.UnitReport{"redis": {Version: "7", State: deployments.StateRetrying}}},
	}}
	want := fmt.Sprintf("ready: cache/redis 7 %s, web/app 2 %s, web/base %s", deployments.StateRetrying, deployments.StateConverged, deployments.StateHeld)
	if got := statusLine(s); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := statusLine(policy.NodeStatus{}); got != "not ready" {
		t.Errorf("of nothing known: %q", got)
	}
}
