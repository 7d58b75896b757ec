package mirror

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments/tooltest"
	"kedge/kv/open"
	"kedge/sync/mirror/inspect"
)

// TestMain lets the test's own binary run the programs that tests start as processes.
func TestMain(m *testing.M) {
	var err error
	switch os.Getenv("KEDGE_TEST_AS") {
	case "mirror":
		err = mirrorProcess()
	case "agents":
		err = agentsProcess()
	case "pre-receive":
		err = CheckPush(context.Background(), ".", os.Getenv("KEDGE_PATH"), os.Stdin, nil)
	case "pre-receive-releases":
		err = CheckPush(context.Background(), ".", os.Getenv("KEDGE_PATH"), os.Stdin,
			&inspect.Releases{Objects: object.New(object.Config{})})
	default:
		os.Exit(tooltest.Main(m))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// mirrorProcess runs a mirror on the store that the environment names, until it is killed.
func mirrorProcess() error {
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	store, err := open.Store(open.Config{URL: os.Getenv("KEDGE_KV"), Log: log})
	if err != nil {
		return err
	}
	m, err := New(Config{Store: store, Repo: os.Getenv("KEDGE_TEST_REPO"), Name: os.Getenv("KEDGE_TEST_NAME"), LeaseTTL: 10 * time.Second, Log: log})
	if err != nil {
		return err
	}
	return m.Run(ctx)
}
