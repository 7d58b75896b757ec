package main

import (
	"context"
	"log/slog"
	"os"

	"kedge/sync/trace"
)

// startTraces returns a running sender of spans to the collector that OpenTelemetry's variables name. If they name
// none, the sender is nil, which is usable. The caller must call stop, which ends the sender after at most 2 s for the
// spans that are left.
func startTraces(service string, log *slog.Logger) (traces *trace.Sender, stop func(), err error) {
	c, err := trace.FromEnvironment(os.Getenv, service)
	if err != nil {
		return nil, nil, err
	}
	traces = trace.New(c, log)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		traces.Run(ctx)
	}()
	return traces, func() { cancel(); <-done }, nil
}
