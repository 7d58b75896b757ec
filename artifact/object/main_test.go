package object_test

import (
	"os"
	"testing"

	"kedge/deployments/tooltest"
)

func TestMain(m *testing.M) {
	os.Exit(tooltest.Main(m))
}
