import { defineConfig } from "vite";

// The built page is committed under latentmem/serve/page, with names that stay the same.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../latentmem/serve/page",
    emptyOutDir: true,
    assetsDir: "",
    modulePreload: false,
    rollupOptions: {
      output: { entryFileNames: "page.js", chunkFileNames: "[name].js", assetFileNames: "page[extname]" },
    },
  },
  server: { proxy: Object.fromEntries(["/v1", "/ready"].map((path) => [path, "http://127.0.0.1:8000"])) },
});
