package main

import (
	"context"
	"log/slog"
	"os"

	"kedge/sync/trace"
)

// startTraces sends spans to the collector that OpenTelemetry's variables name, if they name one, until stop is called;
// stop waits a moment for what is left.
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
